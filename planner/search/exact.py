"""Small problems, to proven optimality: an explicit model of options, places and times for CP-SAT."""

from __future__ import annotations

import math

from ortools.sat.python import cp_model

from planner.search.evaluate import evaluate, misfits
from planner.search.positions import Positions
from planner.search.problem import Choice, Infeasible, Order, Placed, Problem, Solution
from planner.search.solver import make_solver
from planner.search.symmetry import break_symmetry
from planner.search.times import Times


def solve_exact(
    problem: Problem, *, seed: int, seconds: float, hint: Solution | None = None
) -> tuple[Choice, Order, float]:
    """The best plan found within `seconds` of deterministic work, and a lower bound of every plan's makespan.

    Never worse than `hint`. Raises Infeasible if no choice fits into memory (nor one with a few bytes to
    spare, where bytes are too many to be counted one by one), TimeoutError if the work was not enough to find
    any plan.
    """
    found: list[tuple[float, Choice, Order]] = []
    if hint is not None:
        found.append((hint.makespan, hint.choice, hint.order))
    plan, bound = _solve(problem, seed, seconds, hint)
    none = bound == math.inf
    if plan is not None and misfits(problem, plan[0]):  # within what rounding of bytes hides
        plan, least = _solve(problem, seed, seconds, hint, tight=True)
        none = least == math.inf
    if plan is not None:
        found.append((evaluate(problem, *plan).makespan, *plan))
    if not found:
        if none:
            short = shortage(problem, seed, seconds)
            raise Infeasible(tuple(call.name for call in problem.calls), max(1, short))
        raise TimeoutError(f"no plan found within {seconds} deterministic seconds")
    makespan, choice, order = min(found, key=lambda one: one[0])
    return choice, order, min(makespan, bound)


def shortage(problem: Problem, seed: int = 0, seconds: float = 10.0) -> int:
    """Bytes that the fullest device lacks where they are fewest (or more, if the work is not enough)."""
    model = cp_model.CpModel()
    space = Positions(problem, model, slack=True)
    break_symmetry(problem, space)
    model.minimize(space.lack)
    solver = make_solver(seed, seconds)
    status = solver.solve(model)
    assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE), solver.status_name(status)
    return max(misfits(problem, space.choice(solver)).values(), default=0)


def _solve(
    problem: Problem, seed: int, seconds: float, hint: Solution | None, *, tight: bool = False
) -> tuple[tuple[Choice, Order] | None, float]:
    """A plan, if one is found that is not far above the hint; the bound (infinite where there is no plan)."""
    model = cp_model.CpModel()
    space = Positions(problem, model, tight=tight)
    times = Times(problem, space, None if hint is None else hint.makespan)
    break_symmetry(problem, space)
    if hint is not None:
        _hint(space, hint.choice)
    model.minimize(times.makespan)
    solver = make_solver(seed, seconds)
    status = solver.solve(model)
    assert status != cp_model.MODEL_INVALID, model.validate()
    if status == cp_model.INFEASIBLE:
        return None, math.inf
    bound = times.bound(solver.best_objective_bound)
    if status == cp_model.UNKNOWN:
        return None, bound
    return (space.choice(solver), times.order(solver)), bound


def _hint(space: Positions, choice: Choice) -> None:
    for name, pairs in space.pairs.items():
        for pair, literal in zip(pairs, space.taken[name], strict=True):
            space.model.add_hint(literal, pair == Placed(choice[name].option, choice[name].place))
