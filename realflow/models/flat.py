"""All parameters of a module as views of one flat buffer.

Optimizer shards, collectives and reallocation then see one tensor, and a fused weight such as
[q; k; v] is a zero-copy view. Order: as `named_parameters()` gives them, except that the members of
a fused group (`FUSED`) come together, all their weights and then all their biases. Tied parameters
appear once. Offsets do not depend on the dtype, so that states of runs in different dtypes agree.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling modules whose parameters lie side by side."""

ALIGNMENT = 32
"""Elements; 64 bytes in two-byte dtypes. Members of a fused group follow each other unaligned."""


class Slot(NamedTuple):
    """Where a parameter lies in the flat buffer, in elements."""

    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FlatBuffer:
    """The flat compute buffer, 1-D. `slots` is in order of offset.

    Elements between slots (alignment) belong to no parameter and are zero.
    """

    storage: torch.Tensor
    slots: Mapping[str, Slot]

    def view(self, name: str) -> torch.Tensor:
        """One parameter, sharing memory."""
        slot = self.slots[name]
        return self.storage[slot.offset : slot.offset + slot.size].view(slot.shape)

    def only(self, names: Collection[str]) -> FlatBuffer:
        """The same memory, with these parameters of it alone."""
        return FlatBuffer(self.storage, {name: slot for name, slot in self.slots.items() if name in names})

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """What of each parameter lies in `[start, stop)` of the buffer.

        Yields `(name, first, last)`, a range of that parameter's own row-major elements
        (`realflow.layout.flat_boxes` turns it into boxes).
        """
        for name, slot in self.slots.items():
            first, last = max(start, slot.offset), min(stop, slot.offset + slot.size)
            if first < last:
                yield name, first - slot.offset, last - slot.offset


def slots_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Slot], int]:
    """Slots for parameters given in module order, and the total number of elements."""
    slots: dict[str, Slot] = {}
    offset = 0
    for group in _fused_groups(list(shapes)):
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        for name in group:
            slots[name] = Slot(offset, tuple(shapes[name]))
            offset += slots[name].size
    return slots, offset


def allocate(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> FlatBuffer:
    """A buffer of zeros for parameters given in module order (each tied parameter once)."""
    slots, total = slots_of(shapes)
    return FlatBuffer(torch.zeros(total, dtype=dtype, device=device), slots)


def _fused_groups(names: list[str]) -> Iterator[list[str]]:
    """Names in module order, in runs that must be adjacent (most runs have one name)."""
    known, done = set(names), set()
    for name in names:
        if name in done:
            continue
        group = [name]
        parent, _, leaf = name.rpartition(".")
        grandparent, _, module = parent.rpartition(".")
        for siblings in FUSED:
            if module in siblings:
                candidates = [f"{grandparent}.{sibling}.{leaf}" for sibling in siblings]
                group = [candidate for candidate in candidates if candidate in known]
        done.update(group)
        yield group
