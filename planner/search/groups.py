"""Devices that no option tells apart, and options that differ in nothing but where they are.

The class model counts devices and knows no positions: a `Pool` is a set of devices of equal memory that
the same options reach, a `Group` the options of a call with equal costs and equally many devices of each
pool. Whatever is merged here only ever loosens the model, so its bound stays valid.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from planner.search.problem import Call, Problem

Runs = tuple[range, ...]

_POOLS = 5  # more are merged: each doubles the number of classes


@dataclass(frozen=True)
class Group:
    """Options of a call that differ only in their places. `counts`: devices of each pool. `members`: option
    index and those of its places that take so many."""

    counts: tuple[int, ...]
    seconds: float
    static: int
    own: int
    active: int
    layout: str
    keeps: bool
    members: tuple[tuple[int, Runs], ...]

    @property
    def size(self) -> int:
        """Number of devices."""
        return sum(self.counts)

    @property
    def costs(self) -> tuple[float, ...]:
        """What must be no greater for an option to be no worse, devices aside."""
        return (self.seconds, self.static, self.own, self.active)


@dataclass(frozen=True)
class Grouped:
    """A problem as the class model sees it: the pool of each device, number of devices and memory of each
    pool, groups of each call. `nested`: of any two places one holds the other, or they share no device."""

    pool_of: tuple[int, ...]
    sizes: tuple[int, ...]
    memory: tuple[int, ...]
    groups: dict[str, tuple[Group, ...]]
    nested: bool

    def restricted(self, sizes: Iterable[int]) -> Grouped | None:
        """With groups of these sizes alone; None where a call is left without any."""
        wanted = {0, *sizes}
        kept = {
            name: tuple(group for group in groups if group.size in wanted)
            for name, groups in self.groups.items()
        }
        if not all(kept.values()):
            return None
        return replace(self, groups=kept)


def grouped(problem: Problem) -> Grouped:
    """The pools and groups of a problem, without groups that others are no worse than."""
    reach = {places: _covered(places) for places in _all_places(problem)}
    pool_of = _pools(problem, set(reach.values()))
    pools = max(pool_of, default=0) + 1
    sizes = Counter(pool_of)
    before = [
        list(accumulate((pool == other for other in pool_of), initial=0)) for pool in range(pools)
    ]  # [pool][device]: devices of the pool before this one

    def counts(place: range) -> tuple[int, ...]:
        return tuple(ahead[place.stop] - ahead[place.start] for ahead in before)

    split = {places: _split(places, counts) for places in reach}
    found = {call.name: _undominated(problem, call, _groups(problem, call, split)) for call in problem.calls}
    memory = [0] * pools
    for device, pool in enumerate(pool_of):
        memory[pool] = max(memory[pool], problem.memory_bytes[device])
    counted = tuple(sizes[pool] for pool in range(pools))
    return Grouped(tuple(pool_of), counted, tuple(memory), found, _nested(reach))


def layout_matters(problem: Problem, call: Call) -> bool:
    """Whether other calls, or moves, tell the layouts of a call apart."""
    if call.model is None:
        return False
    alone = sum(other.model == call.model for other in problem.calls) == 1
    return not alone or call.model in problem.follows or call.model in problem.follows.values()


def _all_places(problem: Problem) -> set[Runs]:
    return {option.places for call in problem.calls for option in call.options}


def _covered(places: Sequence[range]) -> tuple[tuple[int, int], ...]:
    """The devices of any of the runs, as (start, stop) that do not touch."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted({(run.start, run.stop) for run in places if len(run)}):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def _pools(problem: Problem, covered: set[tuple[tuple[int, int], ...]]) -> list[int]:
    """Device -> pool."""
    reached: list[list[int]] = [[] for _ in problem.memory_bytes]
    for index, runs in enumerate(sorted(covered)):
        if runs != ((0, problem.devices),):
            for start, stop in runs:
                for device in range(start, stop):
                    reached[device].append(index)
    for signs in (
        [(size, tuple(by)) for size, by in zip(problem.memory_bytes, reached, strict=True)],
        [(size, ()) for size in problem.memory_bytes],
        [(0, ())] * problem.devices,
    ):
        order = {sign: index for index, sign in enumerate(dict.fromkeys(signs))}
        if len(order) <= _POOLS:
            break
    return [order[sign] for sign in signs]


def _split(
    places: Sequence[range], counts: Callable[[range], tuple[int, ...]]
) -> dict[tuple[int, ...], Runs]:
    """The runs by how many devices of each pool they take."""
    found: defaultdict[tuple[int, ...], list[range]] = defaultdict(list)
    for place in places:
        found[counts(place)].append(place)
    return {key: tuple(runs) for key, runs in found.items()}


def _groups(
    problem: Problem, call: Call, split: Mapping[Runs, Mapping[tuple[int, ...], Runs]]
) -> list[Group]:
    told = layout_matters(problem, call)
    found: dict[Group, list[tuple[int, Runs]]] = {}
    for index, option in enumerate(call.options):
        static, own = option.static_bytes, option.own_bytes
        held = (static, own, option.active_bytes) if told else (static + own, 0, option.active_bytes)
        told_by = (option.layout, option.keeps) if told else ("", True)
        for counts, places in split[option.places].items():
            group = Group(counts, option.duration, *held, *told_by, ())
            found.setdefault(group, []).append((index, places))
    return [replace(group, members=tuple(members)) for group, members in found.items()]


def _undominated(problem: Problem, call: Call, groups: Sequence[Group]) -> tuple[Group, ...]:
    """Without groups that another one could stand in for in any solution: equally many devices and the same
    layout; where no layout is told apart, no more devices of any pool."""
    told = layout_matters(problem, call)
    alike: defaultdict[object, list[Group]] = defaultdict(list)
    for group in sorted(groups, key=lambda group: (group.counts, group.costs, group.layout, group.keeps)):
        rivals = alike[(group.layout, group.keeps, group.counts) if told else None]
        for rival in rivals:
            fewer = told or all(mine <= its for mine, its in zip(rival.counts, group.counts, strict=True))
            if fewer and all(mine <= its for mine, its in zip(rival.costs, group.costs, strict=True)):
                break
        else:
            rivals.append(group)
    return tuple(group for rivals in alike.values() for group in rivals)


def _nested(all_places: Iterable[Runs]) -> bool:
    """Whether of any two runs one holds the other, or they are apart."""
    runs = sorted({(run.start, -run.stop) for places in all_places for run in places if len(run)})
    open_until: list[int] = []
    for start, stop in runs:
        while open_until and open_until[-1] <= start:
            open_until.pop()
        if open_until and -stop > open_until[-1]:
            return False
        open_until.append(-stop)
    return True
