"""Carrying out a schedule: pack, send point to point, unpack.

Memory beyond the two layouts is two buckets, one to send from and one to receive into. Each is
halved, so that one half is packed or unpacked while the other travels.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from realflow.errors import InputError, RunError
from realflow.layout import Box
from realflow.realloc.messages import Message, messages
from realflow.realloc.pack import checksum, pack, unpack
from realflow.realloc.transfers import Schedule, Tensors, Transfer

BUCKET_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Shard:
    """Storage of one box: a view of any strides whose shape is the box's."""

    box: Box
    tensor: torch.Tensor


Shards = Mapping[str, Sequence[Shard]]
"""Parameter -> the boxes that this rank holds of it."""


@dataclass(frozen=True)
class Moved:
    """What one rank did: payload bytes, and seconds from first to last."""

    sent_bytes: int
    received_bytes: int
    copied_bytes: int
    seconds: float


class Buckets:
    """Two byte buffers that are kept from one reallocation to the next.

    All ranks of a reallocation must use the same `bucket_bytes`: messages are cut to half of it.
    """

    def __init__(self, bucket_bytes: int = BUCKET_BYTES, device: torch.device | str = "cpu") -> None:
        if bucket_bytes < 64:
            raise InputError(f"bucket_bytes must be at least 64, not {bucket_bytes}")
        self.slot_bytes = bucket_bytes // 2
        self._device = torch.device(device)
        self._slots: dict[str, list[torch.Tensor]] = {"send": [], "receive": []}

    def slots(self, side: str, size: int) -> list[torch.Tensor]:
        """Two uint8 buffers of at least `size` bytes (at most `slot_bytes`)."""
        assert size <= self.slot_bytes, (size, self.slot_bytes)
        held = self._slots[side]
        if not held or held[0].numel() < size:
            self._slots[side] = []  # let go of the old ones before the new ones are made
            del held
            self._slots[side] = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2)]
        return self._slots[side]


def local_shards(specs: Tensors, rank: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Shard]]:
    """Bind tensors to the boxes that `rank` holds, where it holds one box of each (as under `dN`)."""
    bound: dict[str, list[Shard]] = {}
    for name, spec in specs.items():
        boxes = dict.fromkeys(box for holder, box in spec.holders if holder == rank)
        if len(boxes) > 1:
            raise InputError(f"{name}: rank {rank} holds {len(boxes)} boxes; bind each to its own view")
        bound[name] = [Shard(box, tensors[name]) for box in boxes]
    return bound


def execute(
    part: Schedule,
    rank: int,
    group: dist.ProcessGroup | None,
    read: Shards,
    write: Shards,
    buckets: Buckets | None = None,
) -> Moved:
    """Do this rank's share of a schedule; all ranks of the schedule call it together.

    `part` is `schedule.part(rank)` (or the whole schedule), `read` this rank's storage under the
    source layout, `write` under the destination layout. A box may be bound to the same storage in
    both; storage that overlaps in any other way is not supported. `group` spans the ranks of the
    schedule, which are global ranks, and must not carry other point-to-point traffic meanwhile.

    Raises InputError where a box has no storage or the storage does not fit, before anything is
    sent, and RunError where a peer is lost.
    """
    started = time.perf_counter()
    buckets = buckets or Buckets()
    todo = [m for m in messages(part, buckets.slot_bytes) if rank in (m.source, m.destination)]
    views = {m.order: _views(m, read if m.source == rank else write, part, rank) for m in todo}
    copied = 0
    with torch.no_grad():
        for copy in part.copies:
            if copy.source == rank:
                _copy(copy, part, rank, read, write)
                copied += part.bytes_of(copy)
        _exchange(todo, views, rank, group, buckets)
    return Moved(
        sent_bytes=sum(message.bytes for message in todo if message.source == rank),
        received_bytes=sum(message.bytes for message in todo if message.destination == rank),
        copied_bytes=copied,
        seconds=time.perf_counter() - started,
    )


def _exchange(
    todo: Sequence[Message],
    views: Mapping[tuple[int, int, int], list[torch.Tensor]],
    rank: int,
    group: dist.ProcessGroup | None,
    buckets: Buckets,
) -> None:
    """Send and receive in the common order, as many at once as there are slots.

    It cannot deadlock: take the first message of that order which is not complete. Both of its ends
    wait for nothing but messages before it, which are complete, so both have posted it.
    """
    waiting = {
        "send": deque(message for message in todo if message.source == rank),
        "receive": deque(message for message in todo if message.destination == rank),
    }
    free = {
        side: list(buckets.slots(side, max(message.bytes for message in queue))) if queue else []
        for side, queue in waiting.items()
    }
    flying: dict[tuple[int, int, int], tuple[Message, str, torch.Tensor, dist.Work]] = {}
    while any(waiting.values()) or flying:
        for side, queue in waiting.items():
            while queue and free[side]:
                message, slot = queue.popleft(), free[side].pop()
                flying[message.order] = (message, side, slot, _post(message, side, slot, views, group))
        message, side, slot, work = flying.pop(min(flying))
        try:
            work.wait()
        except RuntimeError as error:
            raise RunError(
                f"realloc: the message of {message.bytes} bytes from rank {message.source} to rank "
                f"{message.destination} failed: {error}"
            ) from error
        if side == "receive":
            unpack(slot[: message.bytes], views[message.order])
        free[side].append(slot)


def _post(
    message: Message,
    side: str,
    slot: torch.Tensor,
    views: Mapping[tuple[int, int, int], list[torch.Tensor]],
    group: dist.ProcessGroup | None,
) -> dist.Work:
    """Start one message: packed and sent, or awaited."""
    buffer = slot[: message.bytes]
    if side == "send":
        pack(views[message.order], buffer)
        work = dist.isend(buffer, message.destination, group=group)
    else:
        work = dist.irecv(buffer, message.source, group=group)
    assert work is not None, "this rank is outside the process group"
    return work


def verify(part: Schedule, rank: int, group: dist.ProcessGroup | None, read: Shards, write: Shards) -> int:
    """Compare checksums of every transfer at its source and its destination, after `execute`.

    All ranks of the schedule call it together, before the source's weights change. Returns how
    many transfers and copies this rank has checked as a destination; raises RunError naming
    parameter and ranks where the bytes differ.
    """
    sums: dict[tuple[int, int], list[int]] = {}
    devices: dict[tuple[int, int], torch.device] = {}  # a group of NCCL carries nothing from the CPU
    for transfer in part.transfers:
        if rank in (transfer.source, transfer.destination):
            held = read if transfer.source == rank else write
            view, pair = _view(transfer.name, transfer.box, held, part, rank), transfer.pair
            sums.setdefault(pair, []).append(checksum(view))
            devices[pair] = view.device
    theirs: dict[tuple[int, int], torch.Tensor] = {}
    works: list[dist.Work | None] = []
    mine: list[torch.Tensor] = []  # kept until all is sent
    for pair in sorted(sums):
        if pair[0] == rank:
            mine.append(torch.tensor(sums[pair], dtype=torch.int64, device=devices[pair]))
            works.append(dist.isend(mine[-1], pair[1], group=group))
        else:
            theirs[pair] = torch.empty(len(sums[pair]), dtype=torch.int64, device=devices[pair])
            works.append(dist.irecv(theirs[pair], pair[0], group=group))
    for work in works:
        assert work is not None, "this rank is outside the process group"
        work.wait()
    checked = 0
    for pair, expected in theirs.items():
        pieces = [t for t in part.transfers if t.pair == pair]
        for transfer, there, here in zip(pieces, expected.tolist(), sums[pair], strict=True):
            _compare(transfer, there, here)
            checked += 1
    for copy in part.copies:
        if copy.source == rank:
            views = [_view(copy.name, copy.box, held, part, rank) for held in (read, write)]
            _compare(copy, checksum(views[0]), checksum(views[1]))
            checked += 1
    return checked


def _compare(transfer: Transfer, there: int, here: int) -> None:
    if there != here:
        raise RunError(
            f"realloc: {transfer.name} {transfer.box} differs after its transfer: checksum "
            f"{there & (1 << 64) - 1:016x} on rank {transfer.source}, {here & (1 << 64) - 1:016x} on rank "
            f"{transfer.destination}"
        )


def _copy(copy: Transfer, part: Schedule, rank: int, read: Shards, write: Shards) -> None:
    """Copy within this rank, unless both layouts share the storage."""
    source = _view(copy.name, copy.box, read, part, rank)
    destination = _view(copy.name, copy.box, write, part, rank)
    if source.data_ptr() != destination.data_ptr() or source.stride() != destination.stride():
        destination.copy_(source)


def _views(message: Message, held: Shards, part: Schedule, rank: int) -> list[torch.Tensor]:
    return [_view(name, box, held, part, rank) for name, box in message.pieces]


def _view(name: str, box: Box, held: Shards, part: Schedule, rank: int) -> torch.Tensor:
    """The storage of a box on this rank."""
    for shard in held.get(name, ()):
        offsets = [(start - low, stop - low) for (start, stop), (low, _) in zip(box, shard.box, strict=True)]
        lengths = tuple(stop - start for start, stop in shard.box)
        if any(start < 0 or stop > length for (start, stop), length in zip(offsets, lengths, strict=True)):
            continue
        tensor, itemsize = shard.tensor, part.itemsizes[name]
        if tuple(tensor.shape) != lengths or tensor.element_size() != itemsize:
            raise InputError(
                f"{name}: box {shard.box} on rank {rank} is bound to a tensor of shape {tuple(tensor.shape)} "
                f"and {tensor.element_size()} bytes an element; expected {lengths} and {itemsize}"
            )
        return tensor[tuple(slice(start, stop) for start, stop in offsets)]
    raise InputError(f"{name}: rank {rank} has no storage bound for box {box}")
