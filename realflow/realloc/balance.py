"""Who sends what: the load of the busiest sender as low as it can be. Pure: no torch.

A class is a number of bytes that any of its senders can send. How many of them each one takes is
chosen in fractions: filling classes in turn up to a common level, given what the others have
assigned, descends the sum of squared loads, which is convex over independent classes, so that it
converges to its minimum; for loads of this kind the minimum of the squares is also the minimum of
the largest load. How close it has come is known at any time: what only the ranks of a set can
send, divided by their number, is a lower bound (max-flow min-cut), and the sets of the most loaded
ranks are the ones that bind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_ROUNDS = 300
_GAP = 2e-3


@dataclass(frozen=True)
class Class:
    """`total` bytes that `senders` (sorted, no rank twice) may divide among themselves."""

    senders: tuple[int, ...]
    total: int


@dataclass(frozen=True)
class Levels:
    """A division: for each class what each of its senders takes, and a bound on the busiest sender."""

    quotas: list[Floats]
    bound: float


def level(classes: Sequence[Class]) -> Levels:
    """Divide each class among its senders so that the largest sum over a sender is least.

    The busiest sender has at most 1.002 times `bound` bytes, which no division can beat (unless 300
    rounds do not suffice: then `bound` still holds).

    >>> level([Class((0,), 6), Class((0, 1), 6)]).quotas
    [array([6.]), array([0., 6.])]
    """
    ranks = sorted({rank for one in classes for rank in one.senders})
    index = {rank: place for place, rank in enumerate(ranks)}
    members = [np.array([index[rank] for rank in one.senders], dtype=np.int64) for one in classes]
    loads = np.zeros(len(ranks))
    quotas = [np.zeros(len(member)) for member in members]
    # Those with the fewest senders have the least choice: they go first.
    order = sorted(range(len(classes)), key=lambda i: (len(members[i]), i))
    bound = 0.0
    for _ in range(_ROUNDS):
        for i in order:
            member = members[i]
            base = loads[member] - quotas[i]
            quotas[i] = pour(base, classes[i].total)
            loads[member] = base + quotas[i]
        bound = max(bound, _bound(classes, members, loads))
        if loads.max(initial=0.0) <= (1 + _GAP) * bound:
            break
        order.reverse()
    return Levels(quotas, bound)


def pour(base: Floats, total: float) -> Floats:
    """Pour `total` over loads of `base`, as water: the lowest rise to one level. What each one gets.

    With k of them below the surface it is at (total + the k lowest) / k, which is least for the k
    that are.
    """
    lowest = np.cumsum(np.sort(base))
    surface = ((total + lowest) / np.arange(1, len(base) + 1)).min()
    return np.maximum(surface - base, 0.0)


def _bound(classes: Sequence[Class], members: Sequence[Ints], loads: Floats) -> float:
    """The best bound from the sets {the k most loaded ranks}: what only they can send, over k."""
    if not classes:
        return 0.0
    order = np.argsort(-loads, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    starts = np.cumsum([0, *(len(member) for member in members[:-1])])
    last = np.maximum.reduceat(place[np.concatenate(members)], starts)  # the k that holds all senders
    only = np.bincount(last, weights=[one.total for one in classes], minlength=len(order))
    return float((np.cumsum(only) / np.arange(1, len(order) + 1)).max())
