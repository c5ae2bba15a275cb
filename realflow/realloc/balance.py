"""Who sends what: the load of the busiest sender as low as it can be. Pure: no torch.

Demands with the same possible senders form a class. How many bytes of each class a sender takes is
chosen first, in fractions: filling classes in turn up to a common level, given what the others
have assigned, descends the sum of squared loads, which is convex over independent classes, so
that it converges to its minimum; for loads of this kind the minimum of the squares is also the
minimum of the largest load. Then each class is laid out in a line and cut at the senders' shares,
which splits at most one tensor less than there are senders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from realflow.layout import Box, box_size

_ROUNDS = 200
_TOLERANCE = 1e-4
_NARROW = 16  # a dim with fewer entries is split only where no longer one is left


@dataclass(frozen=True)
class Demand:
    """A box that a destination lacks."""

    name: str
    box: Box
    destination: int
    itemsize: int

    @property
    def bytes(self) -> int:
        """Bytes of the box."""
        return box_size(self.box) * self.itemsize


Classes = Mapping[tuple[int, ...], Sequence[Demand]]
"""Possible senders -> demands that any of them can serve."""


def share(classes: Classes, min_split_bytes: int) -> tuple[list[tuple[int, Demand]], int]:
    """Assign every demand, whole or in parts, to one sender.

    Returns `(sender, part)` pairs in a fixed order, and a bound on the busiest sender: no
    assignment among the same senders sends less than about that many bytes from its busiest one.
    """
    totals = {senders: sum(demand.bytes for demand in demands) for senders, demands in classes.items()}
    quotas = level(totals)
    loads: dict[int, float] = defaultdict(float)
    for quota in quotas.values():
        for sender, amount in quota.items():
            loads[sender] += amount
    moved = [
        pair
        for senders, demands in classes.items()
        for pair in _cut_line(
            demands, [(sender, quotas[senders][sender]) for sender in senders], min_split_bytes
        )
    ]
    return moved, round(max(loads.values(), default=0.0))


def level(totals: Mapping[tuple[int, ...], float]) -> dict[tuple[int, ...], dict[int, float]]:
    """Divide each class's total among its senders so that the largest sum over a sender is least.

    >>> level({(0,): 6.0, (0, 1): 6.0})
    {(0,): {0: 6.0}, (0, 1): {0: 0.0, 1: 6.0}}
    """
    loads: dict[int, float] = defaultdict(float)
    quotas: dict[tuple[int, ...], dict[int, float]] = {
        senders: dict.fromkeys(senders, 0.0) for senders in totals
    }
    for _ in range(_ROUNDS):
        moved = 0.0
        for senders, total in totals.items():
            quota = quotas[senders]
            filled = _fill({sender: loads[sender] - quota[sender] for sender in senders}, total)
            for sender, amount in filled.items():
                moved = max(moved, abs(amount - quota[sender]))
                loads[sender] += amount - quota[sender]
            quotas[senders] = filled
        if moved <= _TOLERANCE * max(loads.values(), default=0.0):
            break
    return quotas


def _fill(loads: Mapping[int, float], total: float) -> dict[int, float]:
    """Pour `total` over senders that carry `loads`, as water: the lowest rise to one level."""
    order = sorted(loads, key=lambda sender: loads[sender])
    below = 0.0
    surface = 0.0
    for count, sender in enumerate(order, start=1):
        below += loads[sender]
        surface = (total + below) / count
        if count == len(order) or surface <= loads[order[count]]:
            break
    return {sender: max(0.0, surface - load) for sender, load in loads.items()}


def _cut_line(
    demands: Sequence[Demand], quotas: Sequence[tuple[int, float]], min_split_bytes: int
) -> Iterator[tuple[int, Demand]]:
    """Lay the demands in a line and cut it where one sender's share ends and the next begins."""
    done = 0.0
    ends: list[float] = []
    for _, quota in quotas:
        done += quota
        ends.append(done)
    turn = 0
    position = 0
    for demand in demands:
        rest: Demand | None = demand
        while rest is not None:
            # The share of a sender ends early, or late, by less than the least part worth a message.
            while turn + 1 < len(quotas) and ends[turn] - position < min(min_split_bytes, rest.bytes / 2):
                turn += 1
            room = ends[turn] - position
            head, tail = rest, None
            if turn + 1 < len(quotas) and rest.bytes - room >= min_split_bytes:
                head, tail = split(rest, int(room))
            yield quotas[turn][0], head
            position += head.bytes
            rest = tail


def split(demand: Demand, size: int) -> tuple[Demand, Demand | None]:
    """Cut off about the first `size` bytes, at a whole entry of one dim; the rest is None if empty."""
    lengths = [stop - start for start, stop in demand.box]
    long = [dim for dim, length in enumerate(lengths) if length >= _NARROW]
    dim = long[0] if long else max(range(len(lengths)), key=lengths.__getitem__, default=-1)
    if dim < 0 or lengths[dim] == 1:
        return demand, None
    entries = round(lengths[dim] * size / demand.bytes)
    start, stop = demand.box[dim]
    middle = start + min(max(entries, 1), lengths[dim] - 1)
    before = (*demand.box[:dim], (start, middle), *demand.box[dim + 1 :])
    after = (*demand.box[:dim], (middle, stop), *demand.box[dim + 1 :])
    return (
        Demand(demand.name, before, demand.destination, demand.itemsize),
        Demand(demand.name, after, demand.destination, demand.itemsize),
    )
