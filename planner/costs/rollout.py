"""Continuous batching without a model: how many samples run in each pass of a rollout, and at what length.

The engine's rules (`realflow.engines.slots`): queued samples enter free slots before a pass; each running
sample gets a token in each pass; a prompt is prefilled once, other samples of it copy its keys and values; a
pass prefills a bounded number of tokens. Every running sample advances by one token in a round: with p
pipeline stages a round is one pass of each of the p groups of slots.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from planner.lengths import Group, Lengths

PREFILL = 4096
"""Tokens that a pass prefills at most, unless one prompt is longer: the engine's default, said again because
planning imports no torch; `tests/plan` compares them."""

_FINE = 8  # kinds of rounds for each doubling of the running samples
_STEPS = 24  # kinds of rounds between the shortest context and the longest


@dataclass(frozen=True)
class Round:
    """`count` rounds that are alike: `running` samples of `longest` tokens at most, in the mean of them."""

    count: float
    running: float
    longest: float


@dataclass(frozen=True)
class Prefill:
    """`passes` that prefill: `tokens` in each, of `prompts` whose tokens attend to `pairs` keys."""

    passes: float
    tokens: float
    prompts: float
    lengths: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class History:
    """The rounds of a rollout on one replica, and what it prefills. `samples` is how many it draws."""

    rounds: tuple[Round, ...]
    prefill: Prefill
    samples: int


def slowest_replica(lengths: Lengths, prompts: int, samples: int, replicas: int, slots: int) -> list[Group]:
    """What the last replica to end draws, of a typical step.

    Prompts go to replicas as these become free, so that all end with about equal sums; but where all of them
    fit into the slots at once nothing is left to even out what chance has dealt: the slowest has the longest
    response, and as many tokens as the unluckiest of so many replicas may expect.
    """
    share = -(-prompts // replicas)
    if replicas == 1:
        return list(lengths.batch(prompts, samples))
    every = lengths.longest_first(min(prompts, 4096), samples)
    stride = max(1, len(every) // share)
    mine = [every[min(index * stride, len(every) - 1)] for index in range(share)]
    if share * samples > slots:
        return mine
    unlucky, most = _unlucky(lengths, share * samples, replicas), max(pair.response for pair in lengths.pairs)
    return [
        (prompt, tuple(min(most, round(response * unlucky)) for response in responses))
        for prompt, responses in mine
    ]


def as_few(prompts: int, samples: int, replicas: int, slots: int) -> int:
    """The fewest replicas of which the slowest draws the very same as of `replicas`."""
    share = -(-prompts // replicas)
    if replicas == 1 or share * samples <= slots:  # where slots are enough, all replicas count
        return replicas
    return max(2, -(-prompts // share))


def _unlucky(lengths: Lengths, count: int, replicas: int) -> float:
    """By how much the largest of `replicas` sums of `count` responses is above the mean."""
    mean = lengths.response
    return 1 + expected_maximum(replicas) * lengths.deviation / math.sqrt(count) / mean if mean else 1.0


@lru_cache(maxsize=1024)
def expected_maximum(count: int) -> float:
    """Of `count` independent normal variables, in standard deviations (Blom's approximation).

    >>> expected_maximum(1), round(expected_maximum(2), 2), round(expected_maximum(1000), 1)
    (0.0, 0.59, 3.2)
    """
    from statistics import NormalDist

    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def simulate(groups: Sequence[Group], slots: int, common: int = 0) -> History:
    """Draw the samples of `groups` in order, `slots` of them at a time."""
    waiting = [(prompt, response, index) for index, (prompt, some) in enumerate(groups) for response in some]
    seen: set[int] = set()
    admissions: list[list[float]] = []  # of each round with new prompts, what it prefills of each
    ends: list[tuple[int, int]] = []  # round after which a sample ends, and its number
    offsets: list[tuple[int, int]] = []  # -(length at round 0), number
    running: set[int] = set()
    now, entered = 0, 0
    spans: list[tuple[int, int, float]] = []
    while entered < len(waiting) or ends:
        fresh: list[float] = []
        while entered < len(waiting) and len(ends) < slots:
            prompt, response, group = waiting[entered]
            if group not in seen:
                fresh.append(max(0, prompt - 1 - (common if seen else 0)))
                seen.add(group)
            heapq.heappush(ends, (now + max(1, response), entered))
            heapq.heappush(offsets, (now - prompt, entered))
            running.add(entered)
            entered += 1
        if any(fresh):
            admissions.append(fresh)
        while offsets[0][1] not in running:
            heapq.heappop(offsets)
        until, count = ends[0][0], len(ends)
        # The engine reads, in each pass, as many tokens of every slot as the longest has by then.
        spans.append((until - now, count, (now + until - 1) / 2 - offsets[0][0]))
        now = until
        while ends and ends[0][0] == now:
            running.discard(heapq.heappop(ends)[1])
    return History(_merged(spans), _prefilled(admissions), len(waiting))


def _merged(spans: Sequence[tuple[int, int, float]]) -> tuple[Round, ...]:
    """Rounds that are nearly alike as one kind."""
    found: dict[tuple[int, int], list[float]] = {}
    most = max(longest for _, _, longest in spans)
    for rounds, running, longest in spans:
        key = round(math.log2(running) * _FINE), round(longest / most * _STEPS)
        entry = found.setdefault(key, [0.0, 0.0, 0.0])
        entry[0] += rounds
        entry[1] += rounds * running
        entry[2] += rounds * longest
    return tuple(Round(n, total / n, length / n) for n, total, length in found.values())


def _prefilled(admissions: Sequence[Sequence[float]]) -> Prefill:
    """Prompts by the passes that prefill them, in the mean of these."""
    passes = sum(max(1, math.ceil(sum(fresh) / PREFILL)) for fresh in admissions)
    counts: dict[float, float] = {}
    for length in (length for fresh in admissions for length in fresh if length):
        counts[length] = counts.get(length, 0.0) + 1.0
    if not counts:
        return Prefill(0, 0, 0, ())
    each = tuple(sorted((length, count / passes) for length, count in counts.items()))
    return Prefill(
        passes, sum(length * count for length, count in each), sum(count for _, count in each), each
    )
