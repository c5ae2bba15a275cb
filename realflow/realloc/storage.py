"""Where the boxes of parameters lie: storage bindings.

A binding says for one box of a parameter in which tensor's memory it lies, from where on, with
which strides and as which dtype. A fused QKV matrix, stacked experts, a flat buffer and a plain
parameter are all bound the same way, as sources and as destinations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from realflow.errors import InputError
from realflow.layout import Box, box_size, lengths
from realflow.realloc.given import uniform
from realflow.realloc.specs import Tensors


def contains(box: Box, part: Box) -> bool:
    """Whether `part` lies inside `box`."""
    return all(low <= start and stop <= high for (low, high), (start, stop) in zip(box, part, strict=True))


@dataclass(frozen=True, eq=False)
class Storage:
    """Memory of one box. Element (i, j, ..) of it lies at `offset + i * strides[0] + ...`.

    `offset` and `strides` count elements of `dtype` from the first element of `tensor`, whose own
    shape and dtype do not matter: only its memory does, which is looked up at every use.
    """

    box: Box
    tensor: torch.Tensor
    offset: int
    strides: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.box) or self.offset < 0 or any(step < 0 for step in self.strides):
            raise InputError(
                f"storage of box {self.box}: offset {self.offset} and strides {self.strides} do not fit; "
                f"expected an offset of at least 0 and {len(self.box)} strides of at least 0"
            )
        first = self.tensor.storage_offset() * self.tensor.element_size()
        if first % self.dtype.itemsize:
            raise InputError(f"storage of box {self.box}: a tensor at byte {first} cannot hold {self.dtype}")
        if box_size(self.box) == 0:
            return
        spans = (step * (size - 1) for step, size in zip(self.strides, lengths(self.box), strict=True))
        last = first + (self.offset + sum(spans) + 1) * self.dtype.itemsize
        if last > (size := self.tensor.untyped_storage().nbytes()):
            raise InputError(
                f"storage of box {self.box}: offset {self.offset} and strides {self.strides} reach byte "
                f"{last} of memory of {size} bytes"
            )

    @classmethod
    def of(cls, box: Box, view: torch.Tensor) -> Storage:
        """Bind a box to a tensor of the box's shape, with any strides. Raises InputError otherwise."""
        if tuple(view.shape) != lengths(box):
            raise InputError(
                f"storage of box {box}: bound to a tensor of shape {tuple(view.shape)}; expected "
                f"{lengths(box)}"
            )
        return cls(box, view, 0, tuple(view.stride()), view.dtype)

    def at(self, part: Box) -> int:
        """Offset in elements of the first element of `part`, which lies inside the box."""
        starts = (start - low for (start, _), (low, _) in zip(part, self.box, strict=True))
        return self.offset + sum(start * step for start, step in zip(starts, self.strides, strict=True))

    def view(self, part: Box | None = None) -> torch.Tensor:
        """The box, or a part of it, as a tensor on the same memory."""
        part = self.box if part is None else part
        base = torch.empty(0, dtype=self.dtype, device=self.tensor.device)
        first = self.tensor.storage_offset() * self.tensor.element_size() // self.dtype.itemsize
        return base.set_(self.tensor.untyped_storage(), first + self.at(part), lengths(part), self.strides)


@dataclass(frozen=True, eq=False)
class Computed:
    """A box of a source that is made when it is sent, such as base weights with an adapter merged in.

    `make(part)` returns the elements of a part of the box, of that shape and of `dtype`; it is called
    once for each piece, and for a piece that is verified once more. What it returns may be as
    large as half a bucket.
    """

    box: Box
    dtype: torch.dtype
    make: Callable[[Box], torch.Tensor]

    def tensor(self, part: Box) -> torch.Tensor:
        """The elements of a part, contiguous. Raises InputError for another shape or dtype."""
        made = self.make(part).detach()
        if tuple(made.shape) != lengths(part) or made.dtype != self.dtype:
            raise InputError(
                f"a computed source gave {made.dtype} of shape {tuple(made.shape)} for box {part}; expected "
                f"{self.dtype} of shape {lengths(part)}"
            )
        return made.contiguous()


Bindings = Mapping[str, Sequence[Storage | Computed]]
"""Parameter -> the boxes that this rank holds of it."""


def find(bindings: Bindings, name: str, part: Box, rank: int) -> Storage | Computed:
    """What is bound for a box that contains `part`. Raises InputError where nothing is."""
    for bound in bindings.get(name, ()):
        if len(bound.box) == len(part) and contains(bound.box, part):
            return bound
    raise InputError(f"{name}: rank {rank} has no storage bound for box {part}")


def local_shards(
    specs: Tensors, rank: int, tensors: Mapping[str, torch.Tensor]
) -> dict[str, list[Storage | Computed]]:
    """Bind tensors to the boxes that `rank` holds, where it holds one box of each.

    Raises InputError where it holds several, has no tensor for one, or one of another shape.
    """
    bound: dict[str, list[Storage | Computed]] = {}
    for name, spec in uniform(("given", specs))[0].items():
        boxes = dict.fromkeys(box for holder, box in spec.holders if holder == rank)
        if len(boxes) > 1:
            raise InputError(f"{name}: rank {rank} holds {len(boxes)} boxes; bind each to its own storage")
        if boxes and name not in tensors:
            raise InputError(
                f"{name}: rank {rank} holds box {next(iter(boxes))}, but no tensor is given for it"
            )
        try:
            bound[name] = [Storage.of(box, tensors[name]) for box in boxes]
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return bound
