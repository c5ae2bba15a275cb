"""FLOPs and messages that real modules spend, counted while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from realflow.layout import DeviceMesh, Layout
from realflow.models.causal import load_model
from realflow.models.heads import values
from realflow.models.logprobs import token_stats
from realflow.models.place import AXES, SETS, Axis, Place

Messages = Counter[tuple[str, int]]
"""(operation, bytes of the whole tensor) -> how many."""


def flops(run: Callable[[], Any]) -> tuple[int, Any]:
    """FLOPs of the matrix products of `run`, and its result."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


@dataclass
class Counted:
    """What one rank spends in forward and backward."""

    flops: dict[str, int] = field(default_factory=dict)
    messages: dict[str, Messages] = field(default_factory=dict)


def place_of(layout: Layout, rank: int) -> Place:
    """A place without process groups: what it would send is recorded by `recording`."""
    mesh = DeviceMesh(tuple(range(layout.size)), layout)

    def axis(name: str) -> Axis | None:
        ranks = next((group for group in mesh.groups(name) if rank in group), None)
        return Axis(ranks, ranks.index(rank), None) if ranks else None

    found: dict[str, Any] = {name: axis(name) for name in (*AXES, *SETS)}
    return Place(layout, found["pp"], found["dp"], found["tp"], found["replica"], found["all"], found["ends"])


@contextmanager
def recording(patch: Any) -> Iterator[Messages]:
    """Collectives leave their tensors as they are, and are counted."""
    found: Messages = Counter()

    def record(operation: str, whole: int) -> Callable[..., None]:
        def collective(*tensors: Any, **others: Any) -> None:
            tensor = tensors[whole]
            found[operation, tensor.numel() * tensor.element_size()] += 1
            if operation != "all_reduce":
                tensors[0].zero_()

        return collective

    with patch.context() as patched:
        patched.setattr(dist, "all_reduce", record("all_reduce", 0))
        patched.setattr(dist, "all_gather_single", record("all_gather", 0))
        patched.setattr(dist, "reduce_scatter_single", record("reduce_scatter", 1))
        yield found


class RankModel:
    """One rank's part of a model, run forward and backward over packed sequences, scoring every token."""

    def __init__(self, folder: Path, layout: Layout, rank: int, lengths: list[int], head: str = "lm") -> None:
        self.model = load_model(folder, dtype="float32", place=place_of(layout, rank), head=head)
        self.model.share = False
        self.tokens = torch.arange(sum(lengths)) % 90 + 5
        positions = torch.cat([torch.arange(length) for length in lengths])
        self.packed = self.model.prepare(self.tokens, positions, torch.tensor([0, *lengths]).cumsum(0).int())

    def run(self, patch: Any, *, sequence: bool = False, recompute: bool = False) -> Counted:
        """What it spends."""
        model, found = self.model, Counted()
        model.sequence_parallel, model.recompute = sequence, recompute
        entering = None
        if not model.stage.embeds:
            rows = model.boundary_rows(self.packed)
            entering = torch.zeros(rows, model.partition.card.hidden, requires_grad=True)
        with recording(patch) as messages:
            found.flops["forward"], result = flops(lambda: self._forward(entering))
        found.messages["forward"] = messages
        with recording(patch) as messages:
            found.flops["backward"], _ = flops(lambda: result.sum().backward())
        found.messages["backward"] = messages
        return found

    def _forward(self, entering: torch.Tensor | None) -> torch.Tensor:
        model = self.model
        states = model.run(self.packed, entering)
        if not model.stage.ends:
            return states
        if model.head_kind != "lm":
            return values(model, states)
        stats = token_stats(states, model.head.weight, self.tokens, vocabulary=model.vocabulary)
        return stats.logprobs
