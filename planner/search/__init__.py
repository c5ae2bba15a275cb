"""The search: which option each call takes, where, and in which order. Knows calls, options and costs only.

evaluate(problem, choice, order) -> Timeline      what a plan costs, for everything in this room
solve(problem, *, seed, work) -> Solution         the best plan found, and a proven lower bound
"""

from planner.search.evaluate import evaluate, misfits
from planner.search.problem import (
    MOVE,
    Call,
    Choice,
    Infeasible,
    Move,
    Option,
    Placed,
    Problem,
    Slot,
    Solution,
    Timeline,
    Work,
)
from planner.search.solve import solve

__all__ = [
    "MOVE",
    "Call",
    "Choice",
    "Infeasible",
    "Move",
    "Option",
    "Placed",
    "Problem",
    "Slot",
    "Solution",
    "Timeline",
    "Work",
    "evaluate",
    "misfits",
    "solve",
]
