"""Which elements of a flat parameter buffer each data-parallel rank owns (ZeRO-1). Pure arithmetic.

Gradients lie in an order of their own, in four regions:

    tied      parameters of first and last stage alike: complete once summed over the two
    partial   whole on every tensor rank, complete once summed over tp
    whole     whole on every tensor rank
    others    everything else, in the order of the compute buffer

Each region is cut into buckets, and each bucket into one equal part for each data-parallel rank. The
regions of what several ranks hold come first and have the same length on all of these ranks, so that
they divide and add such gradients in the same way and stay equal bit for bit; buckets of others can
be reduced while the rest of the backward pass runs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from realflow.layout import cut
from realflow.models.flat import Slot

ALIGNMENT = 32
"""Elements: buckets are multiples of it for each rank where they can."""

BUCKET = 8 * 2**20
"""Elements of a bucket at most: 32 MiB of float32."""


class Run(NamedTuple):
    """`[order, order + size)` in the order of gradients is `[flat, flat + size)` in the compute buffer."""

    order: int
    flat: int
    size: int


class Piece(NamedTuple):
    """Elements `[first, last)` (row-major) of the parameter `name` as held here, from `order` on."""

    name: str
    first: int
    last: int
    order: int


@dataclass(frozen=True)
class Arrangement:
    """`runs` and `buckets` (`[start, stop)`) are in rising order; what no run covers is padding.

    The regions end at `tied`, `partial`, `whole` and `total`.
    """

    slots: Mapping[str, Slot]
    places: Mapping[str, int]
    runs: tuple[Run, ...]
    buckets: tuple[tuple[int, int], ...]
    parts: int
    tied: int
    partial: int
    whole: int
    total: int

    def part(self, bucket: tuple[int, int], rank: int) -> tuple[int, int]:
        """What of a bucket data-parallel rank `rank` owns."""
        size = (bucket[1] - bucket[0]) // self.parts
        return bucket[0] + rank * size, bucket[0] + (rank + 1) * size

    def within(self, start: int, stop: int) -> Iterator[Run]:
        """The runs of `[start, stop)`, cut to it."""
        first = bisect_right(self._ends, start)  # the first run that ends behind it
        for index in range(first, bisect_left(self._begins, stop)):
            order, flat, size = self.runs[index]
            low, high = max(start, order), min(stop, order + size)
            if low < high:
                yield Run(low, flat + low - order, high - low)

    def owned(self, rank: int) -> list[Run]:
        """The runs of all buckets' parts of a rank."""
        return [run for bucket in self.buckets for run in self.within(*self.part(bucket, rank))]

    def names(self, start: int, stop: int) -> Iterator[Piece]:
        """What of each parameter lies in `[start, stop)`."""
        first = max(0, bisect_right(self._placed, (start + 1,)) - 1)  # it may end before `start`
        for place, name in self._placed[first : bisect_left(self._placed, (stop,))]:
            low, high = max(start, place), min(stop, place + self.slots[name].size)
            if low < high:
                yield Piece(name, low - place, high - place, low)

    @cached_property
    def _begins(self) -> list[int]:
        return [run.order for run in self.runs]

    @cached_property
    def _ends(self) -> list[int]:
        return [run.order + run.size for run in self.runs]

    @cached_property
    def _placed(self) -> list[tuple[int, str]]:
        """Parameters in the order of gradients."""
        return sorted((place, name) for name, place in self.places.items())


def arrange(
    slots: Mapping[str, Slot],
    parts: int,
    *,
    tied: Collection[str] = (),
    partial: Collection[str] = (),
    whole: Collection[str] = (),
    bucket: int = BUCKET,
) -> Arrangement:
    """Arrange the parameters of `slots` (in order of offset) for `parts` data-parallel ranks.

    `whole` may name those of `partial` too. One rank alone needs no buckets: it has one a region.
    """
    unit = parts * ALIGNMENT
    regions = [sorted(tied), sorted(partial), sorted(set(whole) - set(partial))]
    apart = {name for names in regions for name in names}
    assert len(apart) == sum(map(len, regions)), "a parameter is in two regions"
    runs: list[Run] = []
    ends: list[int] = []
    buckets: list[tuple[int, int]] = []

    def close(begin: int, end: int) -> int:
        """End a region that holds something up to `end`, at a multiple of `unit`."""
        units = -(-(end - begin) // unit)
        count = 1 if parts == 1 else -(-units * unit // max(bucket, unit))
        for index in range(min(count, units)):
            low, high = cut(units, min(count, units), index)
            buckets.append((begin + low * unit, begin + high * unit))
        ends.append(begin + units * unit)
        return ends[-1]

    here = 0
    for names in regions:
        begin = here
        for name in names:
            runs.append(Run(here, slots[name].offset, slots[name].size))
            here += slots[name].size
        here = close(begin, here)
    begin = here
    for flat, size in _others(slots, apart):
        runs.append(Run(here, flat, size))
        here += size
    close(begin, here)
    return Arrangement(slots, _places(slots, runs), tuple(runs), tuple(buckets), parts, *ends)


def _others(slots: Mapping[str, Slot], apart: Collection[str]) -> Iterator[tuple[int, int]]:
    """`(offset, size)` of neighbouring parameters outside `apart`, with the gaps between them."""
    start = stop = -1
    for name, slot in slots.items():
        if name in apart:
            if start >= 0:
                yield start, stop - start
            start = -1
        else:
            start = slot.offset if start < 0 else start
            stop = slot.offset + slot.size
    if start >= 0:
        yield start, stop - start


def _places(slots: Mapping[str, Slot], runs: list[Run]) -> dict[str, int]:
    """Where each parameter starts in the order of gradients."""
    ordered = sorted(runs, key=lambda run: run.flat)
    found: dict[str, int] = {}
    index = 0
    for name, slot in slots.items():
        while slot.offset >= ordered[index].flat + ordered[index].size:
            index += 1
        found[name] = ordered[index].order + slot.offset - ordered[index].flat
    return found
