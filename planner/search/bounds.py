"""What every plan takes at least, by arithmetic alone; and which options that leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from planner.search.groups import Group, Grouped
from planner.search.problem import Problem

_SAFE = 1e-9
"""Part by which floating point may be wrong."""


def simple_bound(problem: Problem, view: Grouped) -> float:
    """Seconds: between two barriers no less than the longest path, nor than what all calls take of devices
    times seconds. Where steps overlap nothing waits for long enough to count."""
    return sum(segment.seconds for segment in _segments(problem, view)) * (1 - _SAFE)


def within(problem: Problem, view: Grouped, horizon: float) -> Grouped:
    """Without groups that no plan has which takes at most `horizon` seconds."""
    segments = _segments(problem, view)
    total = sum(segment.seconds for segment in segments)
    kept = {}
    for segment in segments:
        for name in segment.least:
            others = total - segment.seconds
            fits = [group for group in view.groups[name]
                    if (others + segment.having(name, group)) * (1 - _SAFE) <= horizon]  # fmt: skip
            kept[name] = tuple(fits) or view.groups[name]
    return replace(view, groups={name: kept[name] for name in view.groups})


@dataclass(frozen=True)
class _Segment:
    """Calls between two barriers: least seconds of each, least seconds of the longest path before and after
    it, least devices times seconds."""

    least: dict[str, float]
    head: dict[str, float]
    tail: dict[str, float]
    area: dict[str, float]
    devices: int

    @property
    def seconds(self) -> float:
        longest = max((self.head[name] + self.least[name] for name in self.least), default=0.0)
        return max(longest, sum(self.area.values()) / self.devices)

    def having(self, name: str, group: Group) -> float:
        """Seconds if a call takes one of its groups."""
        area = sum(self.area.values()) - self.area[name] + group.size * group.seconds
        return max(self.seconds, self.head[name] + group.seconds + self.tail[name], area / self.devices)


def _segments(problem: Problem, view: Grouped) -> list[_Segment]:
    before = ancestors(problem)
    found = []
    for names in barriers(problem):
        least = {name: min(group.seconds for group in view.groups[name]) for name in names}
        area = {name: min(group.size * group.seconds for group in view.groups[name]) for name in names}
        head: dict[str, float] = {}
        tail = dict.fromkeys(names, 0.0)
        for name in names:
            head[name] = max((head[one] + least[one] for one in names if one in before[name]), default=0.0)
        for name in reversed(names):
            for one in names:
                if one in before[name]:
                    tail[one] = max(tail[one], least[name] + tail[name])
        found.append(_Segment(least, head, tail, area, max(1, problem.devices)))
    return found


def barriers(problem: Problem) -> list[list[str]]:
    """The calls in segments, each after those that it comes after: every call of a segment comes after all
    calls of the segments before it. One segment where steps overlap."""
    before = ancestors(problem)
    order = sorted((call.name for call in problem.calls), key=lambda name: len(before[name]))
    cuts = [0]
    for index in range(1, len(order)):
        if all(before[name] >= set(order[:index]) for name in order[index:]):
            cuts.append(index)
    return [order[start:stop] for start, stop in pairwise([*cuts, len(order)])]


def ancestors(problem: Problem) -> dict[str, set[str]]:
    """Call -> all calls that have ended when it starts: none for sure where steps overlap."""
    found: dict[str, set[str]] = {}

    def of(name: str) -> set[str]:
        if name not in found:
            direct = problem.call(name).after if problem.overlap == 1 else ()
            found[name] = set(direct).union(*(of(other) for other in direct))
        return found[name]

    return {call.name: of(call.name) for call in problem.calls}
