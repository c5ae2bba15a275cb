"""Amounts beside the usual ones (`planner.options.ways`), where memory decides: slots, micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from planner.options.ways import Way, Wishes

TIGHT = 8
"""Smaller amounts than the usual ones are looked at where they save more than this part of a device."""
LEAST_TOKENS = 256
"""The smallest micro-batch that is looked at."""


def finer(
    generates: bool,
    listed: Sequence[Way],
    wishes: Wishes,
    needs: Callable[[Way], int],
    room: int,
    longest: int,
) -> Iterator[Way]:
    """More ways of a call than are `listed` for a layout: with the most slots that fit where not all usual
    numbers do, and with powers of two below the usual ones where these need much of a device. `needs` are the
    bytes of a way, `longest` the tokens of a sequence: smaller micro-batches save nothing."""
    if generates and wishes.slots is None:
        for same in _alike([replace(way, slots=0) for way in listed], listed):
            yield from _more_slots(same, needs, room)
    elif not generates and wishes.micro_batch_tokens is None:
        for same in _alike([replace(way, micro_batch_tokens=0) for way in listed], listed):
            yield from _smaller_batches(same, needs, room, longest)


def _alike(keys: Sequence[Way], listed: Sequence[Way]) -> list[list[Way]]:
    """The ways that differ by an amount alone, rising."""
    found: dict[Way, list[Way]] = {}
    for key, way in zip(keys, listed, strict=True):
        found.setdefault(key, []).append(way)
    return [sorted(ways, key=lambda way: (way.slots, way.micro_batch_tokens)) for ways in found.values()]


def _more_slots(same: Sequence[Way], needs: Callable[[Way], int], room: int) -> Iterator[Way]:
    least = same[0]
    if needs(least) - needs(replace(least, slots=1)) > room // TIGHT or needs(least) > room:
        yield from (replace(least, slots=slots) for slots in _powers(1, least.slots))
    low = max((way.slots for way in same if needs(way) <= room), default=0)
    high = min((way.slots for way in same if needs(way) > room), default=None)
    if high is None:
        return
    most = low
    while high - most > 1:
        middle = (most + high) // 2
        if needs(replace(least, slots=middle)) <= room:
            most = middle
        else:
            high = middle
    if most > low:
        yield replace(least, slots=most)


def _smaller_batches(
    same: Sequence[Way], needs: Callable[[Way], int], room: int, longest: int
) -> Iterator[Way]:
    least = same[0]
    floor = max(LEAST_TOKENS, longest)
    smallest = replace(least, micro_batch_tokens=min(floor, least.micro_batch_tokens))
    if needs(least) - needs(smallest) > room // TIGHT or needs(least) > room:
        tokens = dict.fromkeys([floor, *_powers(floor, least.micro_batch_tokens)])
        yield from (replace(least, micro_batch_tokens=n) for n in tokens if n < least.micro_batch_tokens)


def _powers(first: int, stop: int) -> list[int]:
    """Powers of two from `first` on, below `stop`."""
    return [1 << bit for bit in range(stop.bit_length()) if first <= 1 << bit < stop]
