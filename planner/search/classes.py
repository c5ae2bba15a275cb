"""The class model: a bound for any number of devices, and plans whose places `realise` then finds.

`Space` counts devices by the calls that use them; here come starts, orders, moves and stages. Seconds are
counted in ticks and rounded down, calls may be wherever the counts allow, and what is let go between a move
and its call is not watched: whatever `evaluate` accepts is a solution here that takes no longer, so no plan
is below the bound.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from typing import Any

from ortools.sat.python import cp_model

from planner.search.bounds import barriers, within
from planner.search.groups import Grouped
from planner.search.operations import Operations
from planner.search.problem import MOVE, Choice, Problem, Solution
from planner.search.sketches import Found, Sketch, Span
from planner.search.solver import make_solver

_CLOSE = 1e-6
"""Gap at which the solver stops."""


def solve_classes(
    problem: Problem,
    view: Grouped,
    *,
    seed: int,
    seconds: float,
    horizon: float,
    hint: Solution | None = None,
    light: bool = False,
) -> Found:
    """Bound and sketches of plans that take at most `horizon` seconds, within so many deterministic seconds
    of the solver. Where there is none, the bound is the horizon. The bound holds for the whole problem only
    if `view` has all its groups. `light`: with few linear relaxations, which is faster where few are needed
    for the proof, and proves less where many are."""
    model = _Model(problem, within(problem, view, horizon), horizon)
    if hint is not None:
        model.hint(hint.choice, hint)
    solver = make_solver(seed, seconds)
    solver.parameters.linearization_level = 1 if light else 2
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


class _Model(Operations):
    """What keeps operations apart that share devices, and what is read from solutions."""

    def __init__(self, problem: Problem, view: Grouped, horizon: float) -> None:
        super().__init__(problem, view, horizon)
        self._apart()
        self._load()
        self._area()
        self.model.minimize(self.makespan)

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
