"""How transfers become messages of bounded size, in one order that all ranks share. Pure: no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from realflow.layout import Box, box_size
from realflow.realloc.schedule import Schedule, Transfer

BUCKET_BYTES = 64 << 20
"""Most bytes of each of the two buckets of a rank; a message has at most half as many."""
ALONE_BYTES = 8 << 20
"""Pieces of as many bytes are messages of their own."""


@dataclass(frozen=True)
class Message:
    """Pieces of parameters that travel in one buffer, one after the other without gaps.

    `turn` counts the messages of the pair and hop before this one.
    """

    source: int
    destination: int
    hop: int
    turn: int
    pieces: tuple[tuple[str, Box], ...]
    bytes: int

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Place in the order that all ranks follow.

        Relays come after what they pass on. Messages of one turn and one distance between ranks form
        a permutation, so that neighbours in this order seldom wait for the same rank.
        """
        return self.hop, self.turn, self.destination - self.source, self.source

    def other(self, rank: int) -> int:
        """The rank at the other end from `rank`."""
        return self.destination if rank == self.source else self.source


def messages(schedule: Schedule, limit: int, alone: int | None = None) -> list[Message]:
    """The messages of a schedule (or of one rank's part of it), in order; none exceeds `limit` bytes.

    A piece of at least `alone` bytes (None: `limit`) is a message of its own: where it lies in one run
    of memory it is sent from there and received there. A pair's messages follow from the pair's transfers
    alone, so that both ends of a pair find the same ones from their own parts.
    """
    pairs: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
    for transfer in schedule.transfers:
        pairs[transfer.hop, transfer.source, transfer.destination].append(transfer)
    found: list[Message] = []
    for (hop, source, destination), moved in pairs.items():
        batches = _batches(_pieces(moved, schedule, limit), limit, min(alone or limit, limit))
        for turn, (batch, size) in enumerate(batches):
            found.append(Message(source, destination, hop, turn, tuple(batch), size))
    return sorted(found, key=lambda message: message.order)


def _pieces(moved: list[Transfer], schedule: Schedule, limit: int) -> Iterator[tuple[str, Box, int]]:
    """Parts of at most `limit` bytes, with their bytes. Larger elements go first: so each element
    lies at a multiple of its own size in the buffer."""
    sizes = schedule.itemsizes
    for transfer in sorted(moved, key=lambda transfer: -sizes[transfer.name]):
        itemsize = sizes[transfer.name]
        assert itemsize <= limit, (transfer.name, itemsize, limit)
        for box in within(transfer.box, limit // itemsize):
            yield transfer.name, box, box_size(box) * itemsize


def _batches(
    pieces: Iterator[tuple[str, Box, int]], limit: int, alone: int
) -> Iterator[tuple[list[tuple[str, Box]], int]]:
    """Pieces that travel together, with their bytes. The large ones go first, one by one."""
    small: list[tuple[str, Box, int]] = []
    for name, box, size in pieces:
        if size >= alone:
            yield [(name, box)], size
        else:
            small.append((name, box, size))
    batch: list[tuple[str, Box]] = []
    filled = 0
    for name, box, size in small:
        if batch and filled + size > limit:
            yield batch, filled
            batch, filled = [], 0
        batch.append((name, box))
        filled += size
    if batch:
        yield batch, filled


def within(box: Box, elements: int) -> Iterator[Box]:
    """Cut a box, in row-major order, into boxes of at most `elements` elements."""
    if box_size(box) <= elements:
        yield box
        return
    dim = next(dim for dim, (start, stop) in enumerate(box) if stop - start > 1)
    start, stop = box[dim]
    step = max(1, elements // (box_size(box) // (stop - start)))
    for low in range(start, stop, step):
        yield from within((*box[:dim], (low, min(low + step, stop)), *box[dim + 1 :]), elements)
