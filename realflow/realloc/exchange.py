"""Carrying out a schedule: pack, send point to point, unpack.

Memory beyond the two layouts is two buckets, one to send from and one to receive into. Each is
halved, so that one half is packed or unpacked while the other travels. What lies in one run of
memory travels without them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from realflow.errors import RunError
from realflow.layout import Box, box_size
from realflow.realloc.agree import agree
from realflow.realloc.bound import Bound, Launch, Wire
from realflow.realloc.buckets import Buckets
from realflow.realloc.compare import Received, checked
from realflow.realloc.messages import Message, within
from realflow.realloc.pack import checksums, move
from realflow.realloc.schedule import Schedule
from realflow.realloc.storage import Bindings, find

IN_FLIGHT = 16
"""Messages of a rank that may be under way. Two that it sends and two that it receives are in slots."""


@dataclass(frozen=True)
class Moved:
    """What one rank did: payload bytes, and seconds from first to last."""

    sent_bytes: int
    received_bytes: int
    copied_bytes: int
    seconds: float


@dataclass(frozen=True, eq=False)
class _End:
    """This rank's end of a message."""

    message: Message
    sends: bool
    launch: Launch
    direct: bool  # sent from, or received into, the storage itself

    @property
    def side(self) -> str:
        return "send" if self.sends else "receive"


class Reallocation:
    """One rank's share of a schedule, ready to be carried out any number of times.

    `part` is `schedule.part(rank)` (or the whole schedule), `read` this rank's storage under the
    source layout, `write` under the destination layout. A box may be bound to the same storage in
    both, and is then shared; storage that overlaps in any other way is not supported. `group` spans the
    ranks of the schedule, which are global ranks, and must carry no other point-to-point traffic while
    this runs. `wire` names the dtypes in which parameters travel where source and destination
    differ: the destination's, unless the source's is smaller. With `decay` the destination follows
    the source: it becomes `decay * destination + (1 - decay) * source`; ranks that hold the same box
    of it must hold the same numbers.

    Tables are built here, once. Raises InputError where a box has no storage or the storage does not
    fit, before anything is sent.
    """

    def __init__(
        self,
        part: Schedule,
        rank: int,
        group: dist.ProcessGroup | None,
        read: Bindings,
        write: Bindings,
        buckets: Buckets | None = None,
        wire: Wire = None,
        decay: float | None = None,
    ) -> None:
        self._bound = bound = Bound(part, rank, group, read, write, buckets or Buckets(), wire, decay)
        self._ends = [_end(bound, message) for message in bound.messages()]
        self._copies = list(_copies(bound))
        self._received: Received = {}
        self._agreed = False
        self.sent_bytes = sum(end.message.bytes for end in self._ends if end.sends)
        self.received_bytes = sum(end.message.bytes for end in self._ends if not end.sends)
        self.copied_bytes = sum(part.bytes_of(copy) for copy in part.copies if copy.source == rank)

    @torch.no_grad()
    def run(self, record: bool = False) -> Moved:
        """Move the weights; all ranks of the schedule call it together.

        `record` keeps checksums of what arrives, which `verify` needs where the destination is an
        average. Raises RunError where a peer is lost or has another schedule.
        """
        started = time.perf_counter()
        if not self._agreed:
            agree(self._bound, [end.message for end in self._ends])
            self._agreed = True
        self._received = {}
        _Exchange(self._bound, self._ends, self._copies, self._received if record else None).run()
        seconds = time.perf_counter() - started
        return Moved(self.sent_bytes, self.received_bytes, self.copied_bytes, seconds)

    @torch.no_grad()
    def verify(self, share: float = 1.0, seed: int = 0) -> int:
        """Compare checksums at both ends after `run`, before the source's weights change.

        All ranks of the schedule call it together. `share` and `seed` choose the parameters, the
        same on all ranks. Returns how many pieces this rank has checked as a destination; raises
        RunError naming parameter and ranks where the bytes differ.
        """
        return checked(self._bound, share, seed, self._received)


def execute(
    part: Schedule,
    rank: int,
    group: dist.ProcessGroup | None,
    read: Bindings,
    write: Bindings,
    buckets: Buckets | None = None,
    wire: Wire = None,
    decay: float | None = None,
) -> Moved:
    """Carry out a rank's share of a schedule once: see `Reallocation`."""
    return Reallocation(part, rank, group, read, write, buckets, wire, decay).run()


def verify(
    part: Schedule,
    rank: int,
    group: dist.ProcessGroup | None,
    read: Bindings,
    write: Bindings,
    buckets: Buckets | None = None,
    wire: Wire = None,
) -> int:
    """Compare checksums of all that a schedule moved, after `execute`: see `Reallocation.verify`."""
    return Reallocation(part, rank, group, read, write, buckets, wire).verify()


def _end(bound: Bound, message: Message) -> _End:
    sends = message.source == bound.rank
    launch = bound.launch(message, sends)
    return _End(message, sends, launch, launch.run is not None)


def _copies(bound: Bound) -> Iterator[tuple[Launch, Launch]]:
    """Local copies in tables of about a slot each, so that messages are served between them."""
    batch: list[tuple[str, Box]] = []
    filled = 0
    limit = bound.buckets.slot_bytes
    for copy in bound.part.copies:
        if copy.source != bound.rank or bound.shared(copy):
            continue
        size = find(bound.read, copy.name, copy.box, bound.rank).dtype.itemsize
        for box in within(copy.box, max(1, limit // size)):
            if batch and filled + box_size(box) * size > limit:
                yield bound.copies(batch)
                batch, filled = [], 0
            batch.append((copy.name, box))
            filled += box_size(box) * size
    if batch:
        yield bound.copies(batch)


class _Exchange:
    """One run: sends and receives in one common order, as many at once as there is room for.

    A rank posts its messages, sends and receives together, in `message.order`, and completes them in
    it. It cannot deadlock, even where a transport begins a message only after those posted before it
    (NCCL does so for the messages of a pair of ranks, or for all of a rank's, and a large one ends
    when both its ends have begun): take the first message of the order that is not complete. What
    its two ranks posted before it is complete, so has given back its slots, and both have posted it
    and begun. A relay waits for all of hop 0, which is before it in the order.
    """

    def __init__(
        self,
        bound: Bound,
        ends: list[_End],
        copies: list[tuple[Launch, Launch]],
        received: Received | None,
    ) -> None:
        self._bound, self._received = bound, received
        self._copies = deque(copies)
        self._queue = deque(ends)
        self._free = {side: self._slots(side) for side in ("send", "receive")}
        self._flying: dict[tuple[int, int, int, int], tuple[_End, torch.Tensor, dist.Work]] = {}
        self._awaited = sum(not end.sends and not end.message.hop for end in ends)  # of hop 0

    def _slots(self, side: str) -> list[torch.Tensor]:
        sizes = [end.message.bytes for end in self._queue if end.side == side and not end.direct]
        return list(self._bound.buckets.slots(side, max(sizes))) if sizes else []

    def run(self) -> None:
        while self._queue or self._flying:
            while self._ready():
                self._post(self._queue.popleft())
            self._copy()
            if self._flying:
                self._complete()
        while self._copies:
            self._copy()

    def _ready(self) -> bool:
        """Whether the next message may start."""
        if not self._queue or len(self._flying) == IN_FLIGHT:
            return False
        end = self._queue[0]
        if end.sends and end.message.hop and self._awaited:
            return False
        return end.direct or bool(self._free[end.side])

    def _post(self, end: _End) -> None:
        """Start one message: packed and sent, or awaited."""
        message, group = end.message, self._bound.group
        slot = end.launch.memory() if end.direct else self._free[end.side].pop()
        buffer = slot[: message.bytes]
        if end.sends:
            if not end.direct:
                move(end.launch.tensors(), end.launch.table, [buffer])
            work = dist.isend(buffer, message.destination, group=group)
        else:
            work = dist.irecv(buffer, message.source, group=group)
        assert work is not None, "this rank is outside the process group"
        self._flying[message.order] = (end, slot, work)

    def _complete(self) -> None:
        """Wait for the first message in flight, and unpack it."""
        end, slot, work = self._flying.pop(min(self._flying))
        message = end.message
        try:
            work.wait()
        except RuntimeError as error:
            raise RunError(
                f"realloc: the message of {message.bytes} bytes from rank {message.source} to rank "
                f"{message.destination} failed: {error}"
            ) from error
        if not end.sends:
            buffer = slot[: message.bytes]
            if self._received is not None:
                self._record(message, buffer)
            if not end.direct:
                move([buffer], end.launch.table, end.launch.tensors(), self._bound.decay or 0.0)
            self._awaited -= not message.hop
        if not end.direct:
            self._free[end.side].append(slot)

    def _record(self, message: Message, buffer: torch.Tensor) -> None:
        """Keep the checksum of every piece as it arrived."""
        assert self._received is not None
        sizes = self._bound.part.itemsizes
        bounds = [0]
        for name, box in message.pieces:
            bounds.append(bounds[-1] + box_size(box) * sizes[name])
        sums = checksums(buffer, bounds)
        for (name, box), value in zip(message.pieces, sums, strict=True):
            self._received[message.source, name, box] = value

    def _copy(self) -> None:
        """One batch of local copies, if there is one left."""
        if self._copies:
            sources, destinations = self._copies.popleft()
            move(sources.tensors(), sources.table, destinations.tensors(), self._bound.decay or 0.0)
