"""From bytes to boxes: which pieces each sender takes, and who relays. Pure: no torch.

What a class of senders has to send is laid in a line, piece after piece, and cut where one
sender's share ends and the next one's begins. A share is met only to within the size of what can be
cut off, so classes are cut one after another and each makes up for the errors of those before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from realflow.layout import Box, box_size
from realflow.realloc.balance import Class, Floats, Ints, level, pour
from realflow.realloc.cells import range_boxes
from realflow.realloc.schedule import Rows, joined, rows_of

_ALIGNED = 128  # bytes: a row that is cut in two is cut here, if the grain is not finer


@dataclass(frozen=True)
class Pieces:
    """Columns of pieces: parameter, box (both by number) and `target`.

    The target is the rank that lacks the piece, or, for pieces that are to be relayed, the number of
    the class that sends them to the relay.
    """

    name: Ints
    box: Ints
    target: Ints

    def take(self, chosen: Ints) -> Pieces:
        """The pieces at these indices."""
        return Pieces(self.name[chosen], self.box[chosen], self.target[chosen])


class Boxes:
    """Every box that occurs, with a number of its own."""

    def __init__(self) -> None:
        self.all: list[Box] = []
        self._sizes: list[int] = []
        self._column: Ints = np.zeros(0, dtype=np.int64)
        self._numbers: dict[Box, int] = {}

    def number(self, box: Box) -> int:
        """The number of a box, a new one where it is new."""
        found = self._numbers.get(box)
        if found is None:
            found = self._numbers[box] = len(self.all)
            self.all.append(box)
            self._sizes.append(box_size(box))
        return found

    def elements(self, numbers: Ints) -> Ints:
        """Elements of each box."""
        if len(self._column) < len(self._sizes):
            new = np.array(self._sizes[len(self._column) :], dtype=np.int64)
            self._column = np.concatenate([self._column, new])
        return self._column[numbers]


@dataclass
class Line:
    """Blocks of pieces that one class of senders serves.

    A block is every parameter of one pattern with one box and one target.
    """

    pattern: list[int] = field(default_factory=list)
    box: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    relayed: list[Pieces] = field(default_factory=list)

    def add(self, pattern: int, box: int, target: int) -> None:
        """Append a block."""
        self.pattern.append(pattern)
        self.box.append(box)
        self.target.append(target)

    def pieces(self, names: Sequence[Ints]) -> Pieces:
        """All pieces, those of one target together. `names` are the parameters of each pattern."""
        counts = np.array([len(names[pattern]) for pattern in self.pattern], dtype=np.int64)
        blocks = [names[pattern] for pattern in self.pattern]
        repeated = [np.repeat(np.array(column, dtype=np.int64), counts) for column in (self.box, self.target)]
        empty = np.zeros(0, dtype=np.int64)  # a class may have nothing but what is to be relayed
        found = Pieces(
            np.concatenate([empty, *blocks, *(pieces.name for pieces in self.relayed)]),
            np.concatenate([repeated[0], *(pieces.box for pieces in self.relayed)]),
            np.concatenate([repeated[1], *(pieces.target for pieces in self.relayed)]),
        )
        return found.take(np.argsort(found.target, kind="stable"))


@dataclass(frozen=True)
class Demands:
    """What must be sent. All of it names parameters by number; `itemsizes` has one entry for each.

    `direct[i]` are the pieces that any of `senders[i]` may send; `relays[group]` those that all of
    `group` (ranks of one node) lack and nobody in their node holds: one of them gets each piece and
    passes it on to the others.
    """

    names: Sequence[Ints]
    itemsizes: Ints
    boxes: Boxes
    senders: Sequence[tuple[int, ...]]
    direct: Sequence[Line]
    relays: Mapping[tuple[int, ...], Line]

    def bytes(self, pieces: Pieces) -> Ints:
        """Bytes of each piece."""
        return self.boxes.elements(pieces.box) * self.itemsizes[pieces.name]


def share(demands: Demands, grain: int) -> tuple[Rows, int]:
    """Find a sender for every piece, whole or in parts of at least `grain` bytes.

    Returns the rows of the transfers and a lower bound on the bytes of the busiest sender, which sends
    whole bytes: the quotient of two whole numbers that `level` finds is rounded up.
    """
    through = {group: line.pieces(demands.names) for group, line in demands.relays.items()}
    totals = np.array(
        [int(demands.bytes(line.pieces(demands.names)).sum()) for line in demands.direct], dtype=np.int64
    )
    classes = []
    for group, pieces in through.items():
        sizes = demands.bytes(pieces)
        np.add.at(totals, pieces.target, sizes)
        classes.append(Class(group, int(sizes.sum()) * (len(group) - 1)))
    classes += [Class(ranks, int(total)) for ranks, total in zip(demands.senders, totals, strict=True)]
    levels = level(classes)
    ledger = _Ledger(classes, levels.quotas)
    groups = list(through)
    rows: list[Rows] = []
    # Relays first: what they receive is a demand like any other.
    for i in _turns(classes, range(len(groups)), grain):
        rows.extend(_relay(i, groups[i], through[groups[i]], demands, ledger, grain))
    for i in _turns(classes, range(len(groups), len(classes)), grain):
        pieces = demands.direct[i - len(groups)].pieces(demands.names)
        for sender, taken in _cut(pieces, ledger, i, demands, grain):
            rows.append(rows_of(taken.name, taken.box, sender, taken.target))
    return joined(rows), math.ceil(levels.bound)


def _turns(classes: Sequence[Class], chosen: Sequence[int], grain: int) -> list[int]:
    """The order in which classes are cut: those come last that are best at making up for errors.

    What is too small to be divided comes first, the largest before the others; then what can be
    divided, the largest last.
    """

    def turn(i: int) -> tuple[bool, int]:
        total = classes[i].total
        return (True, total) if total >= 2 * grain else (False, -total)

    return sorted(chosen, key=turn)


class _Ledger:
    """What each sender will have sent in the end, as far as is known."""

    def __init__(self, classes: Sequence[Class], quotas: Sequence[Floats]) -> None:
        self._classes = classes
        self._quotas = quotas
        self._expected: dict[int, float] = defaultdict(float)
        for one, quota in zip(classes, quotas, strict=True):
            for sender, amount in zip(one.senders, quota.tolist(), strict=True):
                self._expected[sender] += amount

    def open(self, i: int, whole: bool) -> dict[int, float]:
        """The share of each sender of class i: its quota, corrected by what it took too much before.

        `whole`: the class cannot be divided, so that all of it is for the one who has least.
        """
        senders, quota, total = self._classes[i].senders, self._quotas[i], self._classes[i].total
        base = np.array([self._expected[sender] for sender in senders]) - quota
        if whole:
            return {senders[int(base.argmin())]: float(total)}
        chosen = np.flatnonzero(quota)  # whoever has no quota is not drawn in, which would make more messages
        shares = pour(base[chosen], total)
        return {senders[place]: share for place, share in zip(chosen.tolist(), shares.tolist(), strict=True)}

    def close(self, i: int, taken: Mapping[int, float]) -> None:
        """Book what the senders of class i have taken."""
        for sender, quota in zip(self._classes[i].senders, self._quotas[i].tolist(), strict=True):
            self._expected[sender] += taken.get(sender, 0.0) - quota


def _relay(
    i: int, group: tuple[int, ...], pieces: Pieces, demands: Demands, ledger: _Ledger, grain: int
) -> Iterator[Rows]:
    """Divide a group's pieces among its ranks: each gets its part from outside and passes it on.

    A relay sends each byte to all others of the group, so that parts are cut finer by that much.
    """
    others = len(group) - 1
    for relay, taken in _cut(pieces, ledger, i, demands, max(1, grain // others), others):
        for other in group:
            if other != relay:
                yield rows_of(taken.name, taken.box, relay, other, hop=1)
        targets = np.full(len(taken.name), relay, dtype=np.int64)
        for number in np.unique(taken.target).tolist():
            chosen = np.flatnonzero(taken.target == number)
            demands.direct[number].relayed.append(
                Pieces(taken.name[chosen], taken.box[chosen], targets[chosen])
            )


def _cut(
    pieces: Pieces, ledger: _Ledger, i: int, demands: Demands, grain: int, times: int = 1
) -> Iterator[tuple[int, Pieces]]:
    """Cut the line of pieces at the senders' shares; each byte counts `times` for its sender."""
    sizes = demands.bytes(pieces)
    shares = ledger.open(i, whole=len(sizes) == 1 and int(sizes[0]) < 2 * grain)
    ends = np.cumsum(sizes)
    cuts = [0, *_positions(pieces, ends, list(shares.values()), demands, grain, times), int(ends[-1])]
    ledger.close(i, {sender: (b - a) * times for sender, a, b in zip(shares, cuts, cuts[1:], strict=False)})
    starts = ends - sizes
    for sender, low, high in zip(shares, cuts, cuts[1:], strict=False):
        if low == high:
            continue
        first, last = int(np.searchsorted(ends, low, "right")), int(np.searchsorted(starts, high, "left"))
        whole = np.arange(first, last)
        inside = (starts[first:last] >= low) & (ends[first:last] <= high)
        yield sender, pieces.take(whole[inside])
        for at in whole[~inside].tolist():
            yield sender, _part(pieces, at, max(low - int(starts[at]), 0), high - int(starts[at]), demands)


def _part(pieces: Pieces, at: int, low: int, high: int, demands: Demands) -> Pieces:
    """Bytes [low, high) of one piece, as boxes."""
    name, target = int(pieces.name[at]), int(pieces.target[at])
    box, itemsize = demands.boxes.all[int(pieces.box[at])], int(demands.itemsizes[name])
    stop = min(high // itemsize, box_size(box))
    found = [demands.boxes.number(part) for part in range_boxes(box, low // itemsize, stop)]
    return Pieces(
        np.full(len(found), name, dtype=np.int64),
        np.array(found, dtype=np.int64),
        np.full(len(found), target, dtype=np.int64),
    )


def _positions(
    pieces: Pieces, ends: Ints, shares: Sequence[float], demands: Demands, grain: int, times: int
) -> Iterator[int]:
    """Where to cut the line between one sender's share and the next one's, in bytes, rising."""
    wanted = np.minimum(np.cumsum(shares)[:-1] / times, float(ends[-1]))
    before = 0
    for place, at in zip(wanted.tolist(), np.searchsorted(ends, wanted, "left").tolist(), strict=True):
        start = int(ends[at - 1]) if at else 0
        name = int(pieces.name[at])
        box, itemsize = demands.boxes.all[int(pieces.box[at])], int(demands.itemsizes[name])
        low = max(before - start, 0)
        before = start + _snap(place - start, low, int(ends[at]) - start, box, itemsize, grain)
        yield before


def _snap(place: float, low: int, high: int, box: Box, itemsize: int, grain: int) -> int:
    """The byte nearest to `place` where a piece of `high` bytes, cut at `low` before, may be cut.

    That is at one of the two or, with `grain` bytes at least on either side, between them: at whole
    rows of as many dims as can be, which have no more than `grain` bytes.
    """
    units = [max(1, min(_ALIGNED, grain) // itemsize)]
    row = 1
    for start, stop in reversed(box):
        row *= stop - start
        if row * itemsize > grain:
            break
        units.append(row)
    options = [low, high]
    for step in (unit * itemsize for unit in reversed(units)):
        least, most = -(-(low + grain) // step) * step, (high - grain) // step * step
        if least <= most:
            options.append(min(max(round(place / step) * step, least), most))
            break
    return min(options, key=lambda option: abs(option - place))
