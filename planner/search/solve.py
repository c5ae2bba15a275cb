"""The search as a whole: first plans, the class model, places, and for small problems the exact model."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from planner.search.bounds import simple_bound
from planner.search.classes import solve_classes
from planner.search.dominated import undominated
from planner.search.evaluate import evaluate, misfits
from planner.search.exact import solve_exact
from planner.search.fits import refuse
from planner.search.groups import Grouped, grouped
from planner.search.local import improve
from planner.search.problem import Choice, Infeasible, Order, Problem, Solution, Work
from planner.search.realise import realise
from planner.search.sketches import Found, ticks_of

_SMALL = 16
"""Devices up to which the explicit model proves what the class model leaves open."""
_PROVEN = 1e-6
"""A gap that is none."""
_ROUNDED = 16
"""Ticks that rounding may leave between the bound and the plan that it belongs to."""
_FIRST = 0.25
"""Part of the solver's work for plans with powers of two of devices, where there are others."""
_LIGHT = 0.25
"""Part of the solver's work with few linear relaxations, for large problems: they suffice for most proofs, in
a fraction of the time. Small ones take little time in any case."""
_SOME = 10_000
"""Moves that are looked at where only their size matters."""
_PLACING = 0.05
"""Part of the solver's work for the places of one sketch."""


def solve(problem: Problem, *, seed: int = 0, work: Work | None = None) -> Solution:
    """The best plan found within `work`, and a lower bound of every plan's makespan. The same seed and work
    give the same solution on any machine. Raises Infeasible where no choice fits into memory."""
    search = _Search(problem, seed, work or Work())
    search.first()
    search.powers()
    search.everything()
    search.exactly()
    search.last()
    return search.solution()


class _Search:
    """The best plan and bound so far, and the work that is left."""

    def __init__(self, problem: Problem, seed: int, work: Work) -> None:
        self.problem, self.seed, self.work, self.left = problem, seed, work, work.solver
        self.view = grouped(problem)
        self.bound = simple_bound(problem, self.view)
        self.best: Solution | None = None
        self.rounding = max(_PROVEN, _ROUNDED / ticks_of(problem.devices))

    @property
    def large(self) -> bool:
        """Whether the explicit model is too large to prove anything."""
        return self.problem.devices > _SMALL

    @property
    def proven(self) -> bool:
        """Whether the best plan is known to be best."""
        return self.best is not None and self.bound >= self.best.makespan * (1 - self.rounding)

    def offer(self, plan: tuple[Choice, Order] | None) -> None:
        """Keep a plan if it is better."""
        if plan is None or misfits(self.problem, plan[0]):
            return
        timeline = evaluate(self.problem, *plan)
        if self.best is None or timeline.makespan < self.best.makespan:
            considered = sum(len(option.places) for call in self.problem.calls for option in call.options)
            self.best = Solution(dict(plan[0]), plan[1], timeline, timeline.makespan, 0.0, considered)

    def first(self) -> None:
        """A good plan soon."""
        self.offer(improve(self.problem, seed=self.seed, rounds=self.work.rounds))

    def powers(self) -> None:
        """Plans with powers of two of devices: few options, hardly worse than all."""
        view = self.view.restricted([1 << bit for bit in range(self.problem.devices.bit_length())])
        if view is not None and not self.proven and view.groups != self.view.groups:
            self._classes(view, _FIRST * self.work.solver, light=self.large)

    def everything(self) -> None:
        """The class model of all options: it gives the bound."""
        if self.best is None:
            self.bound = max(self.bound, self._classes(self.view, _FIRST * self.work.solver).bound)
        if self.large and self.best is not None and not self.proven:
            seconds = min(self.left, _LIGHT * self.work.solver)
            self.bound = max(self.bound, self._classes(self.view, seconds, light=True).bound)
        if self.best is not None and not self.proven:
            self.bound = max(self.bound, self._classes(self.view, self.left).bound)

    def exactly(self) -> None:
        """The explicit model, where it is small enough."""
        if self.proven or self.large:
            return
        reduced = undominated(self.problem)
        choice = None if self.best is None else reduced.reduced(self.best.choice)
        hint = None if self.best is None or choice is None else replace(self.best, choice=choice)
        seconds = max(1.0, self.left)
        try:
            plan = solve_exact(reduced.problem, seed=self.seed, seconds=seconds, hint=hint)
        except (Infeasible, TimeoutError):
            return  # `solution` says what does not fit
        self.offer((reduced.whole(plan[0]), plan[1]))
        self.bound = max(self.bound, plan[2])

    def last(self) -> None:
        """What small changes to the best plan still gain."""
        if self.best is not None and not self.proven:
            start = (self.best.choice, self.best.order)
            self.offer(improve(self.problem, seed=self.seed, rounds=self.work.rounds, start=start))

    def solution(self) -> Solution:
        """What was found; Infeasible where that is nothing."""
        if self.best is None:
            refuse(self.problem, seed=self.seed, seconds=self.work.solver)
        return replace(self.best, bound=min(self.bound, self.best.makespan))

    def _classes(self, view: Grouped, seconds: float, *, light: bool = False) -> Found:
        horizon = self.best.makespan if self.best else _longest(self.problem, view)
        found = solve_classes(
            self.problem, view, seed=self.seed, seconds=seconds, horizon=horizon, hint=self.best, light=light
        )
        self.left = max(0.0, self.left - found.spent)
        for sketch in found.sketches:
            placing = _PLACING * self.work.solver
            self.offer(realise(self.problem, view, sketch, seed=self.seed, seconds=placing))
            if self.best is not None and self.best.makespan <= found.bound * (1 + self.rounding):
                break
        return found


def _longest(problem: Problem, view: Grouped) -> float:
    """Seconds that are more than enough: everything one by one, and twice as long."""
    calls = sum(max(group.seconds for group in groups) for groups in view.groups.values())
    some = islice(problem.moves.values(), _SOME)  # all of them may take long to ask for
    longest = max((max(move.inside, move.apart) for move in some), default=0.0)
    return calls * 2 + len(problem.calls) * longest
