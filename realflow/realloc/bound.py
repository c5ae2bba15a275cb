"""One rank's part of a schedule, bound to the memory that it reads and writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from realflow.errors import InputError
from realflow.layout import Box, box_size, lengths
from realflow.realloc.buckets import Buckets
from realflow.realloc.messages import Message, messages, within
from realflow.realloc.pack import Row, Side, contiguous, rows, table
from realflow.realloc.schedule import Schedule, Transfer
from realflow.realloc.storage import Bindings, Computed, Storage, find

Wire = Mapping[str, torch.dtype] | torch.dtype | None
"""The dtype in which parameters travel: for each, for all, or (None) that of the storage."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of the kernel on one side of a message, or on local copies.

    `bases` are the tensors of the storage side; a computed one is made when the call is. `run` is
    `(tensor, first byte, bytes)` where all of it is one run of that tensor's memory, bytes as they are.
    """

    bases: tuple[torch.Tensor | tuple[Computed, Box], ...]
    table: torch.Tensor
    run: tuple[torch.Tensor, int, int] | None = None

    def tensors(self) -> list[torch.Tensor]:
        """The tensors of the storage side, computed ones made now."""
        return [base if isinstance(base, torch.Tensor) else base[0].tensor(base[1]) for base in self.bases]

    def memory(self) -> torch.Tensor:
        """The one run of memory as uint8 [bytes], without a copy."""
        assert self.run is not None
        tensor, first, size = self.run
        start = tensor.storage_offset() * tensor.element_size() + first
        base = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return base.set_(tensor.untyped_storage(), start, (size,), (1,))


@dataclass
class _Bases:
    """The tensors of a launch, each once."""

    held: list[torch.Tensor | tuple[Computed, Box]] = field(default_factory=list)
    known: dict[int, int] = field(default_factory=dict)

    def side(self, bound: Storage | Computed, part: Box) -> Side:
        """Where a part of a box lies."""
        size = bound.dtype.itemsize
        if isinstance(bound, Computed):
            self.held.append((bound, part))
            return Side(len(self.held) - 1, 0, contiguous(lengths(part), size), bound.dtype)
        base = self.known.setdefault(id(bound.tensor), len(self.held))
        if base == len(self.held):
            self.held.append(bound.tensor)
        strides = tuple(step * size for step in bound.strides)
        return Side(base, bound.at(part) * size, strides, bound.dtype)


@dataclass(frozen=True, eq=False)
class Bound:
    """A rank's part of a schedule and all that it needs to carry it out.

    `read` is the storage under the source layout, `write` that under the destination layout. With
    `decay`, destinations become `decay * there + (1 - decay) * new`.
    """

    part: Schedule
    rank: int
    group: dist.ProcessGroup | None
    read: Bindings
    write: Bindings
    buckets: Buckets
    wire: Wire = None
    decay: float | None = None

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay <= 1:
            raise InputError(f"decay must be from 0 to 1, not {self.decay}")

    def messages(self) -> list[Message]:
        """This rank's messages, in the order that all ranks share."""
        found = messages(self.part, self.buckets.slot_bytes, self.buckets.alone_bytes)
        return [message for message in found if self.rank in (message.source, message.destination)]

    def end(self, name: str, part: Box, hop: int, sends: bool) -> Storage | Computed:
        """What a piece is sent from or received into. A relay sends from its destination storage."""
        bound = find(self.read if sends and not hop else self.write, name, part, self.rank)
        if not sends and isinstance(bound, Computed):
            raise InputError(f"{name}: a computed box cannot be written; bind {bound.box} to storage")
        return bound

    def travels_as(self, name: str, stored: torch.dtype) -> torch.dtype:
        """The dtype in which a parameter travels. Raises InputError where it is unknown."""
        wire = self.wire.get(name, stored) if isinstance(self.wire, Mapping) else (self.wire or stored)
        if wire.itemsize != self.part.itemsizes[name]:
            raise InputError(
                f"{name}: rank {self.rank} has {stored} and would move {wire.itemsize} bytes an element, but "
                f"the schedule moves {self.part.itemsizes[name]}; name the dtype of that size in `wire`"
            )
        return wire

    def launch(self, message: Message, sends: bool) -> Launch:
        """The table that packs a message (`sends`) or unpacks it, between storage and base 0, a buffer."""
        bases = _Bases()
        found: list[Row] = []
        packed = 0
        for name, part in message.pieces:
            bound = self.end(name, part, message.hop, sends)
            there = bases.side(bound, part)
            wire = self.travels_as(name, bound.dtype)
            shape = lengths(part)
            here = Side(0, packed, contiguous(shape, wire.itemsize), wire)
            if self.decay is not None and message.hop and bound.dtype != wire:
                raise InputError(
                    f"{name}: an average in {bound.dtype} cannot be relayed as {wire}; make this schedule "
                    "without a topology"
                )
            # A relay passes on its own average, which is the destination's: replicas start equal.
            blended = self.decay is not None and not message.hop
            found.extend(rows(shape, there, here) if sends else rows(shape, here, there, blended))
            packed = here.offset + here.strides[0] * shape[0] if shape else packed + wire.itemsize
        assert packed == message.bytes, (packed, message)
        return Launch(tuple(bases.held), table(found), _run(bases, found, sends, packed))

    def packing(self, name: str, part: Box, hop: int, sends: bool) -> Launch:
        """The table that packs one piece from either end, to compare what lies there."""
        bases = _Bases()
        bound = self.end(name, part, hop, sends)
        wire = self.travels_as(name, bound.dtype)
        shape = lengths(part)
        here = Side(0, 0, contiguous(shape, wire.itemsize), wire)
        found = table(list(rows(shape, bases.side(bound, part), here)))
        return Launch(tuple(bases.held), found)

    def copies(self, pieces: Iterable[tuple[str, Box]]) -> tuple[Launch, Launch]:
        """The table that copies pieces at home, with its sources and its destinations."""
        sources, destinations = _Bases(), _Bases()
        found: list[Row] = []
        for name, part in pieces:
            one = find(self.read, name, part, self.rank)
            other = self.end(name, part, hop=0, sends=False)
            there, here = sources.side(one, part), destinations.side(other, part)
            found.extend(rows(lengths(part), there, here, self.decay is not None))
        made = table(found)
        return Launch(tuple(sources.held), made), Launch(tuple(destinations.held), made)

    def copy_batches(self) -> Iterator[tuple[Launch, Launch]]:
        """Local copies in tables of about a slot each, so that messages are served between them."""
        batch: list[tuple[str, Box]] = []
        filled = 0
        limit = self.buckets.slot_bytes
        for copy in self.part.copies:
            if copy.source != self.rank or self.shared(copy):
                continue
            size = find(self.read, copy.name, copy.box, self.rank).dtype.itemsize
            for box in within(copy.box, max(1, limit // size)):
                if batch and filled + box_size(box) * size > limit:
                    yield self.copies(batch)
                    batch, filled = [], 0
                batch.append((copy.name, box))
                filled += box_size(box) * size
        if batch:
            yield self.copies(batch)

    def shared(self, copy: Transfer) -> bool:
        """Whether source and destination of a copy are the same memory."""
        one = find(self.read, copy.name, copy.box, self.rank)
        other = self.end(copy.name, copy.box, hop=0, sends=False)
        if isinstance(one, Computed) or isinstance(other, Computed) or one.dtype != other.dtype:
            return False
        a, b = one.view(copy.box), other.view(copy.box)
        return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _run(bases: _Bases, found: list[Row], sends: bool, size: int) -> tuple[torch.Tensor, int, int] | None:
    """The one run of memory that a table reads (`sends`) or writes, if it is one."""
    column = 0 if sends else 4
    at = None
    for row in found:
        groups, inner, length, kind = row[8], row[9], row[10], row[11]
        if (groups, inner, kind) != (1, 1, 0) or row[column] != 0:
            return None
        if at is not None and row[column + 1] != at:
            return None
        at = row[column + 1] + length
    base = bases.held[0] if bases.held else None
    if not isinstance(base, torch.Tensor) or at is None:
        return None
    return base, at - size, size
