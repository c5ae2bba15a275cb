"""Dividing sequences among ranks and micro-batches by estimated time. Pure arithmetic, no torch.

What is decided here is decided once, globally, from lengths alone; every function gives the same
answer for the same input, so that ranks which compute it separately agree.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from realflow.errors import InputError

_CLOSE = 1e-4
"""A largest sum this near the mean (relative) is not worth another round: estimates are coarser."""


@dataclass(frozen=True)
class CostModel:
    """Seconds (or any unit of time) of one sequence: `linear * tokens + quadratic * tokens^2`.

    The square is causal attention. Only the ratio of the two decides how sequences are divided.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    @classmethod
    def for_sizes(
        cls, *, params: int, layers: int, hidden: int, passes: int = 3, flops_per_second: float = 1e12
    ) -> CostModel:
        """From a model's sizes: `2 params` FLOPs a token and `2 layers hidden tokens^2` a sequence.

        Each parameter is one multiply and add; scores and their weighted sum are `4 hidden` FLOPs a
        pair of tokens, half of which are masked. `params` counts those of matrix products (without
        an embedding that is not also the head). `passes` is 1 for a forward pass, 3 with the
        backward pass, which costs twice as much (Narayanan et al., arXiv 2104.04473, appendix).
        """
        scale = passes / flops_per_second
        return cls(linear=2.0 * params * scale, quadratic=2.0 * layers * hidden * scale)

    def __call__(self, tokens: int) -> float:
        """Cost of a sequence of `tokens` tokens."""
        return tokens * (self.linear + self.quadratic * tokens)


def partition(
    costs: Sequence[float], parts: int, *, close: float = _CLOSE, groups: Sequence[int] | None = None
) -> list[list[int]]:
    """Divide indices of `costs` (at least 0) into `parts` lists whose largest sum is small.

    Longest first, each to the part with the least (at most 4/3 of the best), then moves and swaps
    between the fullest part and the others while they help and its sum is over `1 + close` times the
    mean. Every index is in exactly one list, lists are ascending, and none is empty where there are
    `parts` indices or more.

    With `groups` (an entry for each index) those of a group are in one list: it is groups that are
    divided, each of the cost of its members.
    """
    assert parts >= 1, parts
    if groups is not None:
        units = members(groups)
        found = partition([sum(costs[i] for i in unit) for unit in units], parts, close=close)
        return [sorted(i for unit in part for i in units[unit]) for part in found]
    assert all(0 <= cost < float("inf") for cost in costs), "costs must be finite and at least 0"
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    heap = [(0.0, 0, part) for part in range(parts)]  # ties: fewer members first, then the lower part
    lists: list[list[int]] = [[] for _ in range(parts)]
    for index in order:
        load, count, part = heap[0]
        lists[part].append(index)
        heapq.heapreplace(heap, (load + costs[index], count + 1, part))
    _refine(lists, costs, close)
    return [sorted(part) for part in lists]


def members(groups: Sequence[int]) -> list[list[int]]:
    """The indices of each group, in the order in which groups appear."""
    found: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group, []).append(index)
    return list(found.values())


def imbalance(costs: Sequence[float], found: Sequence[Sequence[int]]) -> float:
    """Largest sum of a part over the mean sum: 1.0 is perfect. 1.0 where all costs are 0."""
    loads = [sum(costs[i] for i in part) for part in found]
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def micro_batches(
    lengths: Sequence[int], budget: int, groups: Sequence[int] | None = None
) -> list[list[int]]:
    """Group indices of `lengths` into few micro-batches of at most `budget` tokens each.

    A sequence longer than the budget gets a micro-batch of its own: it has to be computed, and is
    the least memory that can do it. Micro-batches are balanced in tokens where that needs none
    more, ascending inside, and ordered by their first index.

    With `groups` (an entry for each index) those of a group are in one micro-batch, which is theirs
    alone where together they are longer than the budget. Raises InputError for a budget below 1.
    """
    if budget < 1:
        raise InputError(f"micro_batch_tokens must be at least 1, not {budget}")
    if groups is not None:
        units = members(groups)
        parts = micro_batches([sum(lengths[i] for i in unit) for unit in units], budget)
        return sorted(sorted(i for unit in part for i in units[unit]) for part in parts)
    alone = [[i] for i, length in enumerate(lengths) if length > budget]
    small = [i for i, length in enumerate(lengths) if length <= budget]
    found = _best_fit(small, lengths, budget)
    total = sum(lengths[i] for i in small)
    for count in sorted({max(-(-total // budget), 1), len(found)}) if small else ():
        slack = budget * count / total - 1 if total else 0.0
        balanced = partition([lengths[i] for i in small], count, close=min(slack, 0.01))
        if all(sum(lengths[small[j]] for j in part) <= budget for part in balanced):
            found = [[small[j] for j in part] for part in balanced if part]
            break
    return sorted(alone + [sorted(part) for part in found])


def minibatches(ids: Sequence[int], groups: Sequence[int], count: int) -> list[list[int]]:
    """Cut sample ids into `count` minibatches, whatever order they come in.

    `groups` holds the group of each id. Samples are taken in the order of (group, id); groups stay
    whole, and each cut is made at the end of the group nearest to an even share of samples. With
    fewer groups than minibatches, groups are cut too.

    Raises InputError where there are fewer samples than minibatches.
    """
    assert len(ids) == len(groups), (len(ids), len(groups))
    if not 1 <= count <= len(ids):
        raise InputError(f"minibatches: {len(ids)} samples cannot form {count} minibatches")
    ordered = sorted(zip(groups, ids, strict=True))
    starts = [i for i in range(len(ordered)) if i == 0 or ordered[i][0] != ordered[i - 1][0]]
    if len(starts) < count:
        starts = list(range(len(ordered)))
    cuts = [0]  # places in `starts`
    for part in range(1, count):
        target = len(ordered) * part / count
        place = bisect_left(starts, target)
        if place == len(starts) or (place and target - starts[place - 1] <= starts[place] - target):
            place -= 1
        # No part may be empty: at least one group for this one and one for each that follows.
        cuts.append(min(max(place, cuts[-1] + 1), len(starts) - (count - part)))
    bounds = [*(starts[place] for place in cuts), len(ordered)]
    return [[sample for _, sample in ordered[a:b]] for a, b in pairwise(bounds)]


def _best_fit(indices: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: each sequence into the fullest bin that takes it (11/9 of the fewest)."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            bins.append([])
            left, target = budget, len(bins) - 1
        else:
            left, target = room.pop(place)
        bins[target].append(index)
        insort(room, (left - lengths[index], target))
    return bins


@dataclass(frozen=True)
class _Change:
    """Move index `leaving` from the fullest part to part `other` (whose sum is `load`), and `entering`
    (-1: none) back; `shift` is what the fullest part loses."""

    other: int
    load: float
    leaving: int
    entering: int
    shift: float


def _refine(found: list[list[int]], costs: Sequence[float], close: float) -> None:
    """Lower the largest sum by moving or swapping members between the fullest part and another.

    Each round makes the best such change, so the largest sum never grows. Ends when no change
    helps, when the largest sum is within `close` of the mean, or after 4 rounds for each part (256 at
    most: by then what is left to gain is less than the estimates are worth).
    Changes `found` in place.
    """
    order = sorted((sum(costs[i] for i in part), number) for number, part in enumerate(found))
    enough = (1 + close) * sum(load for load, _ in order) / len(order)
    for _ in range(min(4 * len(found), 256)):
        if order[-1][0] <= enough:
            return
        load, full = order.pop()
        change = _best_change(found, costs, load, full, order[:8])
        if change is None:
            return
        found[full].remove(change.leaving)
        found[change.other].append(change.leaving)
        if change.entering >= 0:
            found[change.other].remove(change.entering)
            found[full].append(change.entering)
        del order[bisect_left(order, (change.load, change.other))]
        insort(order, (load - change.shift, full))
        insort(order, (change.load + change.shift, change.other))


def _best_change(
    found: Sequence[Sequence[int]],
    costs: Sequence[float],
    load: float,
    full: int,
    others: Sequence[tuple[float, int]],
) -> _Change | None:
    """The move or swap between part `full` and one of the `others` that helps most, if any does."""
    leavers = sorted((costs[i], i) for i in found[full])
    gain, best = 1e-9 * load, None
    for other_load, other in others:
        excess = load - other_load
        for cost, entering in [(0.0, -1), *((costs[i], i) for i in found[other] if costs[i] > 0)]:
            # After a shift the fuller of the two has lost min(shift, excess - shift): best at half.
            place = bisect_left(leavers, (cost + excess / 2, -1))
            for leaving_cost, leaving in leavers[max(place - 1, 0) : place + 1]:
                shift = leaving_cost - cost
                if min(shift, excess - shift) > gain:
                    gain = min(shift, excess - shift)
                    best = _Change(other, other_load, leaving, entering, shift)
    return best
