"""Why nothing fits: which calls cannot be placed together, and how many bytes are missing."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

from ortools.sat.python import cp_model

from planner.search.groups import Grouped, grouped
from planner.search.problem import Infeasible, Problem
from planner.search.space import Space


def refuse(problem: Problem, view: Grouped, *, seed: int, seconds: float) -> NoReturn:
    """Raise Infeasible with as few calls as possible, each of which could go if the others were not there."""
    short = lacking(problem, view, seed=seed, seconds=seconds)
    names = [call.name for call in problem.calls]
    if short:
        for name in list(names):
            fewer = _only(problem, [other for other in names if other != name])
            if fewer.calls and lacking(fewer, grouped(fewer), seed=seed, seconds=seconds):
                names.remove(name)
    raise Infeasible(tuple(names), short)


def lacking(problem: Problem, view: Grouped, *, seed: int, seconds: float) -> int:
    """Bytes that the fullest device lacks in the best choice, were places not aligned."""
    model = cp_model.CpModel()
    space = Space(problem, view, model, slack=True)
    model.minimize(space.lack)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = seconds
    status = solver.solve(model)
    assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE), solver.status_name(status)
    return int(solver.value(space.lack)) * space.unit


def _only(problem: Problem, names: list[str]) -> Problem:
    """The problem with some of its calls alone."""
    calls = tuple(
        replace(call, after=tuple(before for before in call.after if before in names))
        for call in problem.calls
        if call.name in names
    )
    return replace(problem, calls=calls, follows={}, moves={})
