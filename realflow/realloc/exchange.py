"""Carrying out a schedule: pack, send point to point, unpack.

Memory beyond the two layouts is two buckets, one to send from and one to receive into. Each is
halved, so that one half is packed or unpacked while the other travels. What lies in one run of
memory travels without them.

Ranks that share memory (`neighbours`) send no bytes: a receiver unpacks what it gets from the half that
the sender has packed. They tell one another so in two small messages of their group, "packed" and
"unpacked", which also order the two sides' accesses, end when a peer is lost and last as long as
any other message may. Both say which message of which run they are about, so that one left over from a
run that failed is not taken for another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from realflow.errors import RunError
from realflow.layout import box_size
from realflow.realloc.agree import agree
from realflow.realloc.bound import Bound, Launch, Wire
from realflow.realloc.buckets import Buckets
from realflow.realloc.compare import Received, checked
from realflow.realloc.messages import Message
from realflow.realloc.neighbours import neighbours
from realflow.realloc.pack import checksums, move
from realflow.realloc.schedule import Schedule
from realflow.realloc.storage import Bindings

IN_FLIGHT = 16
"""Messages of a rank that may be under way. Two that it sends and two that it receives are in slots."""
PACKED, UNPACKED = 0, 1
"""Tags of the messages about memory that is shared: of any other message, and of the answer."""
FIRST = 3
"""Where such a message has the first byte of the memory."""
UNHEARD = -1
"""What such a message has been filled with before it comes."""


@dataclass(frozen=True)
class Moved:
    """What one rank did: payload bytes, and seconds from first to last."""

    sent_bytes: int
    received_bytes: int
    copied_bytes: int
    seconds: float
    shared_bytes: int = 0
    """Of `sent_bytes`, those that went through memory that both ranks share."""


@dataclass(frozen=True, eq=False)
class _End:
    """This rank's end of a message."""

    message: Message
    sends: bool
    launch: Launch

    @property
    def side(self) -> str:
        return "send" if self.sends else "receive"


@dataclass(frozen=True, eq=False)
class _Flight:
    """A message under way: the slot that it has here, what travels, and what is waited for.

    What travels is the message; of one in shared memory its place there (see `_Exchange._place`). The
    sender of such a one awaits the same numbers as an answer.
    """

    end: _End
    slot: torch.Tensor | None
    travels: torch.Tensor
    works: list[dist.Work]
    answer: torch.Tensor | None = None


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
        self._copies = list(bound.copy_batches())
        self._received: Received = {}
        self._neighbours: dict[int, torch.Tensor] | None = None  # known from the first run on
        self._runs = 0
        self._whole = True  # until a run fails
        self.sent_bytes = sum(end.message.bytes for end in self._ends if end.sends)
        self.received_bytes = sum(end.message.bytes for end in self._ends if not end.sends)
        self.copied_bytes = sum(part.bytes_of(copy) for copy in part.copies if copy.source == rank)

    @torch.no_grad()
    def run(self, record: bool = False) -> Moved:
        """Move the weights; all ranks of the schedule call it together.

        `record` keeps checksums of what arrives, which `verify` needs where the destination is an
        average. Raises RunError where a peer is lost, has another schedule or is in another run, and after
        a run that failed: what that one left under way nobody can tell from what a new one sends.
        """
        started = time.perf_counter()
        self._refuse_if_broken()
        self._whole = False
        self._runs += 1
        if self._neighbours is None:
            found = [end.message for end in self._ends]
            agree(self._bound, found)
            self._neighbours = neighbours(self._bound, found)
        self._received = {}
        received = self._received if record else None
        _Exchange(self._bound, self._ends, self._copies, self._neighbours, self._runs, received).run()
        self._whole = True
        seconds = time.perf_counter() - started
        return Moved(self.sent_bytes, self.received_bytes, self.copied_bytes, seconds, self.shared_bytes)

    @property
    def shared_bytes(self) -> int:
        """Of `sent_bytes`, those to ranks that share memory with this one; known after the first run."""
        near = self._neighbours or {}
        return sum(end.message.bytes for end in self._ends if end.sends and end.message.destination in near)

    @torch.no_grad()
    def verify(self, share: float = 1.0, seed: int = 0) -> int:
        """Compare checksums at both ends after `run`, before the source's weights change.

        All ranks of the schedule call it together. `share` and `seed` choose the parameters, the
        same on all ranks. Returns how many pieces this rank has checked as a destination; raises
        RunError naming parameter and ranks where the bytes differ.
        """
        self._refuse_if_broken()
        return checked(self._bound, share, seed, self._received)

    def _refuse_if_broken(self) -> None:
        if not self._whole:
            raise RunError(
                f"realloc: run {self._runs} of this reallocation failed on rank {self._bound.rank}, and its "
                "messages may still be under way; start the ranks and their process group anew"
            )


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
    return _End(message, sends, bound.launch(message, sends))


def _wait(work: dist.Work, message: Message) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise RunError(
            f"realloc: the message of {message.bytes} bytes from rank {message.source} to rank "
            f"{message.destination} failed: {error}"
        ) from error


def _numbers(order: tuple[int, ...]) -> str:
    run, hop, turn, first, size = order
    return f"message {turn} of hop {hop} of run {run}, {size} bytes from byte {first} on"


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
        near: Mapping[int, torch.Tensor],
        number: int,
        received: Received | None,
    ) -> None:
        self._number = number
        self._bound, self._near, self._received = bound, near, received
        self._copies = deque(copies)
        self._queue = deque(ends)
        self._free = {side: self._slots(side) for side in ("send", "receive")}
        self._flying: dict[tuple[int, int, int, int], _Flight] = {}
        self._awaited = sum(not end.sends and not end.message.hop for end in ends)  # of hop 0
        self._answers: list[tuple[dist.Work, _Flight]] = []  # with what is being sent

    def _slots(self, side: str) -> list[torch.Tensor]:
        sizes = [end.message.bytes for end in self._queue if end.side == side and self._in_slot(end)]
        return list(self._bound.buckets.slots(side, max(sizes))) if sizes else []

    def _shared(self, end: _End) -> bool:
        return end.message.other(self._bound.rank) in self._near

    def _in_slot(self, end: _End) -> bool:
        """Whether a message needs a slot here: what is shared is received from the sender's."""
        return end.sends if self._shared(end) else end.launch.run is None

    def run(self) -> None:
        while self._queue or self._flying:
            while self._ready():
                self._post(self._queue.popleft())
            self._copy()
            if self._flying:
                self._complete()
        while self._copies:
            self._copy()
        for work, flight in self._answers:
            _wait(work, flight.end.message)

    def _ready(self) -> bool:
        """Whether the next message may start."""
        if not self._queue or len(self._flying) == IN_FLIGHT:
            return False
        end = self._queue[0]
        if end.sends and end.message.hop and self._awaited:
            return False
        return bool(self._free[end.side]) or not self._in_slot(end)

    def _post(self, end: _End) -> None:
        """Start one message: packed and sent, or awaited."""
        message, shared = end.message, self._shared(end)
        slot = self._free[end.side].pop() if self._in_slot(end) else None
        if end.sends and slot is not None:
            move(end.launch.tensors(), end.launch.table, [slot[: message.bytes]])
        answer = None
        if not shared:
            travels = end.launch.memory() if slot is None else slot[: message.bytes]
        elif slot is not None:
            travels = self._place(message, int(slot.storage_offset()))
            answer = torch.full_like(travels, UNHEARD)
        else:
            travels = torch.full_like(self._place(message, 0), UNHEARD)
        works = [self._begin(travels, message, end.sends, PACKED)]
        if answer is not None:
            works.append(self._begin(answer, message, False, UNPACKED))
        self._flying[message.order] = _Flight(end, slot, travels, works, answer)

    def _place(self, message: Message, first: int) -> torch.Tensor:
        """What is told of a message in shared memory, int64 [5]: run, hop, turn, first byte there, bytes."""
        return torch.tensor([self._number, message.hop, message.turn, first, message.bytes])

    def _agreed(self, message: Message, told: torch.Tensor, first: int) -> None:
        """Raises RunError where the other end of a message means another one."""
        mine = self._place(message, first)
        if not torch.equal(told, mine):
            rank, other = self._bound.rank, message.other(self._bound.rank)
            raise RunError(
                f"realloc: rank {rank} expected word from rank {other} of {_numbers(tuple(mine.tolist()))}, "
                f"and had it of {_numbers(tuple(told.tolist()))}: one of them has left a run or its "
                "messages behind; start the ranks and their process group anew"
            )

    def _begin(self, tensor: torch.Tensor, message: Message, sends: bool, tag: int) -> dist.Work:
        """Send a tensor to the other end of a message, or receive it from there."""
        start = dist.isend if sends else dist.irecv
        work = start(tensor, message.other(self._bound.rank), group=self._bound.group, tag=tag)
        assert work is not None, "this rank is outside the process group"
        return work

    def _complete(self) -> None:
        """Wait for the first message in flight, and unpack it."""
        flight = self._flying.pop(min(self._flying))
        end = flight.end
        for work in flight.works:
            _wait(work, end.message)
        if flight.answer is not None:
            self._agreed(end.message, flight.answer, int(flight.travels[FIRST]))
        if not end.sends:
            self._unpack(flight)
            self._awaited -= not end.message.hop
        if flight.slot is not None:
            self._free[end.side].append(flight.slot)

    def _unpack(self, flight: _Flight) -> None:
        end, message = flight.end, flight.end.message
        shared, buffer = self._shared(end), flight.travels
        if shared:
            memory, first = self._near[message.source], int(flight.travels[FIRST])
            self._agreed(message, flight.travels, first)
            assert 0 <= first <= len(memory) - message.bytes, (first, message.bytes, len(memory))
            buffer = memory[first : first + message.bytes]
        if self._received is not None:
            self._record(message, buffer)
        if shared or flight.slot is not None:
            move([buffer], end.launch.table, end.launch.tensors(), self._bound.decay or 0.0)
        if shared:
            self._answers.append((self._begin(flight.travels, message, True, UNPACKED), flight))

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
