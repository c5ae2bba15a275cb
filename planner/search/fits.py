"""Why nothing fits: which calls cannot be placed together, and how many bytes are missing."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

from ortools.sat.python import cp_model

from planner.search.evaluate import misfits
from planner.search.groups import grouped
from planner.search.problem import Infeasible, Option, Placed, Problem
from planner.search.solver import make_solver
from planner.search.space import Space


def refuse(problem: Problem, *, seed: int, seconds: float) -> NoReturn:
    """Raise Infeasible, with so few calls that without any of them the others would fit."""
    short = lacking(problem, seed=seed, seconds=seconds)
    names = [call.name for call in problem.calls]
    for name in list(names) if short else ():
        fewer = _only(problem, [other for other in names if other != name])
        if fewer.calls and lacking(fewer, seed=seed, seconds=seconds):
            names.remove(name)
    raise Infeasible(tuple(names), short or _smallest(problem))


def lacking(problem: Problem, *, seed: int, seconds: float) -> int:
    """Bytes that the fullest device lacks in the best choice, were any set of devices a place (rounded down
    to what the class model counts in)."""
    model = cp_model.CpModel()
    space = Space(problem, grouped(problem), model, slack=True)
    model.minimize(space.lack)
    solver = make_solver(seed, seconds)
    status = solver.solve(model)
    assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE), solver.status_name(status)
    return int(solver.value(space.lack)) * space.unit


def _smallest(problem: Problem) -> int:
    """Bytes that the fullest device lacks if every call takes its smallest option at the first place."""

    def size(option: Option) -> int:
        return option.static_bytes + option.own_bytes + option.active_bytes

    choice = {}
    for call in problem.calls:
        index = min(range(len(call.options)), key=lambda index: size(call.options[index]))
        choice[call.name] = Placed(index, call.options[index].places[0])
    return max(misfits(problem, choice).values(), default=0)


def _only(problem: Problem, names: list[str]) -> Problem:
    """The problem with some of its calls alone."""
    calls = tuple(
        replace(call, after=tuple(before for before in call.after if before in names))
        for call in problem.calls
        if call.name in names
    )
    return replace(problem, calls=calls, follows={}, moves={})
