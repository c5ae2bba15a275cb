"""The class model: a bound for any number of devices, and plans whose places `realise` then finds.

`Space` counts devices by the calls that use them; here come starts, orders, moves and stages. Seconds are
counted in ticks and rounded down, calls may be wherever the counts allow, and what is let go between a move
and its call is not watched: whatever `evaluate` accepts is a solution here that takes no longer, so no plan
is below the bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from ortools.sat.python import cp_model

from planner.search.bounds import ancestors, barriers, within
from planner.search.groups import Group, Grouped
from planner.search.problem import MOVE, Choice, Move, Problem, Solution
from planner.search.solver import make_solver
from planner.search.space import Space

_CLOSE = 1e-6
"""Gap at which the solver stops."""
_PAIRS = 40_000
"""Pairs of layouts between which moves are told apart."""


def ticks_of(devices: int) -> int:
    """Ticks in the longest makespan of interest: times devices they stay inside 32 bits."""
    return max(1 << 16, min(1 << 24, (1 << 30) // max(1, devices)))


@dataclass(frozen=True)
class Span:
    """An operation of a sketch, in ticks."""

    start: int
    end: int
    stage: int = 0


@dataclass(frozen=True)
class Sketch:
    """A solution of the class model: its seconds, the group of each call, spans of calls and moves
    (`MOVE + call`), and pairs of calls of one model that share what they hold, or the second of which has no
    device that the first lacks."""

    makespan: float
    groups: Mapping[str, Group]
    spans: Mapping[str, Span]
    same: frozenset[tuple[str, str]]
    inside: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Found:
    """What the class model says: no plan takes less than `bound` seconds; the best sketches, best first; the
    deterministic seconds that were `spent`."""

    bound: float
    sketches: tuple[Sketch, ...] = ()
    spent: float = 0.0


@dataclass(frozen=True)
class _Step:
    """An operation of the model: `on` are calls whose devices it takes, `if_` literals that it is there."""

    start: Any
    end: Any
    on: tuple[str, ...]
    if_: tuple[Any, ...] = ()
    last: bool = False


def solve_classes(
    problem: Problem,
    view: Grouped,
    *,
    seed: int,
    seconds: float,
    horizon: float,
    hint: Solution | None = None,
) -> Found:
    """Bound and sketches of plans that take at most `horizon` seconds, within so many deterministic seconds
    of the solver. Where there is none, the bound is the horizon. The bound holds for the whole problem only
    if `view` has all its groups."""
    model = _Model(problem, within(problem, view, horizon), horizon)
    if hint is not None:
        model.hint(hint.choice, hint)
    solver = make_solver(seed, seconds)
    solver.parameters.linearization_level = 2
    solver.parameters.relative_gap_limit = _CLOSE
    keep = _Keep(model)
    status = solver.solve(model.model, keep)
    assert status != cp_model.MODEL_INVALID, model.model.validate()
    if status == cp_model.INFEASIBLE:
        return Found(horizon, (), solver.response_proto.deterministic_time)
    bound = max(0.0, solver.best_objective_bound) * model.tick * (1 - 1e-9)
    spent = solver.response_proto.deterministic_time
    return Found(min(bound, horizon), tuple(reversed(keep.sketches)), spent)


class _Keep(cp_model.CpSolverSolutionCallback):
    """Keeps the last few solutions as sketches."""

    def __init__(self, model: _Model) -> None:
        super().__init__()
        self.of, self.sketches = model, []  # type: ignore[var-annotated]

    def on_solution_callback(self) -> None:
        """Read the solution."""
        self.sketches = [*self.sketches[-3:], self.of.sketch(self)]


class _Model:
    """Variables of the time half, beside those of `Space`."""

    def __init__(self, problem: Problem, view: Grouped, horizon: float) -> None:
        self.problem, self.view = problem, view
        self.horizon = ticks_of(problem.devices)
        self.tick = horizon / self.horizon
        self.model = cp_model.CpModel()
        self.space = Space(problem, view, self.model)
        self.before = ancestors(problem)
        self.makespan = self.model.new_int_var(0, self.horizon, "makespan")
        self.seconds = {call.name: self.space.variable(call.name, [self.ticks(group.seconds) for group in
                        view.groups[call.name]]) for call in problem.calls}  # fmt: skip
        self.stage = {call.name: self.model.new_int_var(0, problem.overlap - 1, f"stage.{call.name}")
                      for call in problem.calls}  # fmt: skip
        self.steps: dict[str, _Step] = {}
        for call in problem.calls:
            on = (call.name,) if call.name in self.space.names else ()
            self._step(call.name, self.seconds[call.name], on)
        self._precede()
        self.moving: dict[str, Any] = {}
        for name, train in self._users():
            self._move(name, train)
        for name, train in self._followers():
            self._follow(name, train)
        self._apart()
        self._load()
        self._area()
        self.model.minimize(self.makespan)

    def ticks(self, seconds: float) -> int:
        """Seconds in ticks, rounded down: a hair more than they are must not become one more. What is longer
        than the horizon has no place in any case."""
        return min(self.horizon + 1, int(seconds / self.tick * (1 - 1e-9)))

    def _step(self, what: str, seconds: Any, on: tuple[str, ...], **more: Any) -> _Step:
        start = self.model.new_int_var(0, self.horizon, f"start.{what}")
        step = self.steps[what] = _Step(start, start + seconds, on, **more)
        self.model.add(step.end <= self.makespan)
        return step

    def _precede(self) -> None:
        """Calls wait for those that they come after, as far as both work on the same step."""
        for call in self.problem.calls:
            for other in call.after:
                waits = self.model.add(self.steps[other].end <= self.steps[call.name].start)
                if self.problem.overlap > 1:
                    self.model.add(self.stage[other] <= self.stage[call.name])
                    apart = self.model.new_bool_var("")
                    waits.only_enforce_if(~apart)
                    self.model.add(self.stage[other] < self.stage[call.name]).only_enforce_if(apart)

    def _users(self) -> list[tuple[str, str]]:
        """Calls of trained models, each with the call that trains it; both told apart by classes."""
        trained = self.problem.trained()
        return self._told_apart({call.name: trained[str(call.model)].name for call in self.problem.calls
                                 if call.model in trained and not call.trains})  # fmt: skip

    def _followers(self) -> list[tuple[str, str]]:
        """Calls of followers, each with the call that trains its leader."""
        trained = self.problem.trained()
        leader = self.problem.follows
        return self._told_apart({call.name: trained[leader[str(call.model)]].name
                                 for call in self.problem.calls if call.model in leader})  # fmt: skip

    def _told_apart(self, pairs: dict[str, str]) -> list[tuple[str, str]]:
        return [pair for pair in pairs.items() if {*pair} <= {*self.space.names}]

    def _move(self, name: str, train: str) -> None:
        """The move of a trained model's weights for a call: not where it shares what the train call holds,
        nor where an earlier call shares what is kept."""
        space = self.space
        ahead = [
            other for other, of in self._users() if of == train and self._index(other) < self._index(name)
        ]
        ways = [space.shares[name, train]]
        brought = {}
        for other in ahead:
            by = brought[other] = self.model.new_bool_var("")
            sharing = [call for call, of in self._users() if of == train and call not in (name, other)]
            self.model.add_implication(by, space.shares[name, other])
            self.model.add_implication(by, self.moving[other])
            self.model.add_bool_or([space.keeps[call] for call in (name, other, *sharing)]).only_enforce_if(
                by
            )
            ways.append(by)
        moving = self.moving[name] = self.model.new_bool_var(f"moving.{name}")
        self.model.add_bool_or([*ways, moving])
        for way in ways:
            self.model.add_implication(way, ~moving)
        step = self._moved(name, train, self.problem.call(name).model, moving)
        self.model.add(step.end <= self.steps[name].start).only_enforce_if(moving)
        for other, by in brought.items():
            self.model.add(self.steps[MOVE + other].end <= self.steps[name].start).only_enforce_if(by)

    def _follow(self, name: str, train: str) -> None:
        """The move into what a follower's call holds, at the end of the step."""
        space, mine = self.space, [call.name for call in self.problem.calls
                                   if call.model == self.problem.call(name).model]  # fmt: skip
        ahead = [other for other in mine if other in space.names and self._index(other) < self._index(name)]
        moving = self.moving[name] = self.model.new_bool_var(f"moving.{name}")
        self.model.add_bool_or([moving, *(space.shares[name, other] for other in ahead)])
        step = self._moved(name, train, self.problem.call(name).model, moving, last=True)
        waits = {train, *(mine if self.problem.overlap == 1 else (name,))}
        for other in sorted(waits):
            self.model.add(self.steps[other].end <= step.start).only_enforce_if(moving)

    def _moved(self, name: str, train: str, of: str | None, moving: Any, *, last: bool = False) -> _Step:
        """A move and its duration: by the layouts of both, and whether it leaves the devices of `train`."""
        costs = self._costs(str(of), train, name)
        seconds = self.model.new_int_var(0, self.horizon, f"moves.{name}")
        step = self._step(MOVE + name, seconds, (train, name), if_=(moving,), last=last)
        self.model.add(seconds == 0).only_enforce_if(~moving)
        self.seconds[MOVE + name] = seconds
        leaves = self.space.sticks_out[name, train]
        kinds = [(_least, []), (_apart, [leaves])]
        if any(cost.inside > cost.apart for cost in costs.values()) and all(
            g.size for g in self.view.groups[name]
        ):
            kinds.append((_inside, [~leaves]))
        for source, chosen in self.space.layouts[train].items():
            for cost, when in kinds:
                least = sum(self.ticks(cost(costs[source, into])) * literal
                            for into, literal in self.space.layouts[name].items()
                            if (source, into) in costs)  # fmt: skip
                self.model.add(seconds >= least).only_enforce_if([chosen, moving, *when])
        return step

    def _costs(self, of: str, train: str, name: str) -> dict[tuple[str, str], Move]:
        """Layouts of both calls -> move; none where they are too many, as if moves there took no time."""
        sources, layouts = self.space.layouts[train], self.space.layouts[name]
        if len(sources) * len(layouts) > _PAIRS:
            return {}
        found = {
            (one, other): self.problem.moves.get((of, one, other)) for one in sources for other in layouts
        }
        return {pair: move for pair, move in found.items() if move is not None}

    def _apart(self) -> None:
        """Operations that share a device come one after the other."""
        for (what, one), (its, other) in combinations(self.steps.items(), 2):
            if self._ordered(what, its):
                continue
            here = [*one.if_, *other.if_]
            first, second = self.model.new_bool_var(""), self.model.new_bool_var("")
            self.model.add(one.end <= other.start).only_enforce_if(first)
            self.model.add(other.end <= one.start).only_enforce_if(second)
            if one.last != other.last:
                self.model.add(second == 0 if other.last else first == 0)
            if {*one.on} & {*other.on}:
                self.model.add_bool_or([first, second, *(~literal for literal in here)])
                continue
            for mine in one.on:
                for yours in other.on:
                    meet = self.space.together[mine, yours]
                    self.model.add_bool_or([first, second, ~meet, *(~literal for literal in here)])

    def _ordered(self, what: str, its: str) -> bool:
        """Whether what calls wait for keeps two operations apart anyway."""
        if what.startswith(MOVE) or its.startswith(MOVE):
            return its == MOVE + what or what == MOVE + its
        return what in self.before[its] or its in self.before[what]

    def _load(self) -> None:
        """A device runs one operation at a time, in each segment between barriers and in all."""
        segments = barriers(self.problem)
        cuts: list[Any] = [
            0,
            *(self.model.new_int_var(0, self.horizon, "") for _ in segments[1:]),
            self.makespan,
        ]
        self.segments: list[tuple[list[str], Any, Any]]
        self.segments = [(segment, *span) for segment, span in zip(segments, pairwise(cuts), strict=True)]
        for segment, start, stop in self.segments:
            for name in segment:
                self.model.add(self.steps[name].start >= start)
                self.model.add(self.steps[name].end <= stop)
        moves = [what for what in self.steps if what.startswith(MOVE)]
        for mask in sorted({mask for mask, _ in self.space.present}):
            calls = self.space.inside(mask)
            here = [z for (of, _), z in self.space.present.items() if of == mask]
            loads = [self.makespan - sum(self.seconds[what] for what in (*calls, *(
                     move for move in moves if {*self.steps[move].on} & {*calls})))]  # fmt: skip
            for segment, start, stop in self.segments:
                if len(those := [name for name in calls if name in segment]) > 1:
                    loads.append(stop - start - sum(self.seconds[name] for name in those))
            for present in here:
                for load in loads:
                    self.model.add(load >= 0).only_enforce_if(present)

    def _area(self) -> None:
        """All operations must find room in devices times seconds: implied, but seen by relaxations."""
        after: dict[str, set[str]] = {name: {other for other, those in self.before.items() if name in those}
                                      for name in self.before}  # fmt: skip
        for pool, size in enumerate(self.view.sizes):
            area = {name: self.space.sum(name, [group.counts[pool] * self.ticks(group.seconds)
                          for group in self.view.groups[name]]) for name in self.before}  # fmt: skip
            for segment, start, stop in self.segments:
                self.model.add(sum(area[name] for name in segment) <= size * (stop - start))
            self.model.add(sum(area.values()) <= size * self.makespan)
            for name in area:
                if self.before[name]:
                    done = sum(area[other] for other in sorted(self.before[name]))
                    self.model.add(done <= size * self.steps[name].start)
                if after[name]:
                    left = sum(area[other] for other in sorted(after[name]))
                    self.model.add(left <= size * (self.makespan - self.steps[name].end))

    def _index(self, name: str) -> int:
        return [call.name for call in self.problem.calls].index(name)

    def sketch(self, at: Any) -> Sketch:
        """What the solver found."""
        space = self.space
        spans = {
            what: Span(at.value(step.start), at.value(step.end),
                       0 if what.startswith(MOVE) else at.value(self.stage[what]))
            for what, step in self.steps.items() if all(at.value(literal) for literal in step.if_)
        }  # fmt: skip
        groups = {
            name: next(group for group, literal in zip(self.view.groups[name], literals, strict=True)
                       if at.value(literal))
            for name, literals in space.taken.items()
        }  # fmt: skip
        pairs = [(one, other) for one, other in space.shares if not at.value(space.sticks_out[other, one])]
        return Sketch(
            at.value(self.makespan) * self.tick,
            groups,
            spans,
            frozenset(pair for pair in pairs if at.value(space.shares[pair])),
            frozenset(pairs),
        )

    def hint(self, choice: Choice, solution: Solution) -> None:
        """Start from a plan, as far as its groups are among those of the view."""
        for name, literals in self.space.taken.items():
            for group, literal in zip(self.view.groups[name], literals, strict=True):
                placed = choice[name]
                self.model.add_hint(literal, any(index == placed.option and placed.place in places
                                                 for index, places in group.members))  # fmt: skip
        used: Counter[tuple[int, int]] = Counter()
        for device, pool in enumerate(self.view.pool_of):
            used[
                sum((device in choice[name].place) << bit for bit, name in enumerate(self.space.names)), pool
            ] += 1
        for key, count in self.space.count.items():
            self.model.add_hint(count, used[key])
            self.model.add_hint(self.space.present[key], used[key] > 0)
        for entry in solution.timeline.entries:
            if entry.what in self.steps:
                self.model.add_hint(self.steps[entry.what].start, int(entry.start / self.tick))
            if entry.what in self.stage:
                self.model.add_hint(self.stage[entry.what], entry.stage)


def _least(cost: Move) -> float:
    return min(cost.inside, cost.apart)


def _inside(cost: Move) -> float:
    return cost.inside


def _apart(cost: Move) -> float:
    return cost.apart
