"""How transfers become messages of bounded size, in one order that all ranks share. Pure: no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from realflow.layout import Box, box_size
from realflow.realloc.transfers import Schedule


@dataclass(frozen=True)
class Message:
    """Pieces of parameters that travel in one buffer, one after the other without gaps.

    `turn` counts the messages of the pair before this one.
    """

    source: int
    destination: int
    turn: int
    pieces: tuple[tuple[str, Box], ...]
    bytes: int

    @property
    def order(self) -> tuple[int, int, int]:
        """Place in the order that all ranks follow.

        Messages of one turn and one distance between ranks form a permutation, so that neighbours
        in this order seldom wait for the same rank.
        """
        return self.turn, self.destination - self.source, self.source


def messages(schedule: Schedule, limit: int) -> list[Message]:
    """The messages of a schedule (or of one rank's part of it), in order; none exceeds `limit` bytes.

    A pair's messages follow from the pair's transfers alone, so that both ends of a pair find the
    same ones from their own parts.
    """
    pairs: dict[tuple[int, int], list[tuple[str, Box]]] = defaultdict(list)
    for transfer in schedule.transfers:
        pairs[transfer.source, transfer.destination].append((transfer.name, transfer.box))
    found: list[Message] = []
    for (source, destination), pieces in pairs.items():
        turn = 0
        batch: list[tuple[str, Box]] = []
        filled = 0
        for name, whole in pieces:
            itemsize = schedule.itemsizes[name]
            assert itemsize <= limit, (name, itemsize, limit)
            for box in within(whole, limit // itemsize):
                size = box_size(box) * itemsize
                if batch and filled + size > limit:
                    found.append(Message(source, destination, turn, tuple(batch), filled))
                    turn, batch, filled = turn + 1, [], 0
                batch.append((name, box))
                filled += size
        if batch:
            found.append(Message(source, destination, turn, tuple(batch), filled))
    return sorted(found, key=lambda message: message.order)


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
