"""The quick cost of a plan is the cost of a plan."""

from __future__ import annotations

import random

import pytest
import random_problems

from planner.search import evaluate, misfits
from planner.search.quick import Draft, Quick


def random_draft(rng: random.Random, quick: Quick) -> Draft:
    choice = random_problems.random_choice(rng, quick.problem)
    placed = [choice[call.name] for call in quick.calls]
    order = list(range(2 * quick.count))
    rng.shuffle(order)
    return Draft(
        [one.option for one in placed],
        [one.place.start for one in placed],
        [one.place.stop for one in placed],
        [rng.randrange(quick.problem.overlap) for _ in placed],
        order,
    )


def test_quick_costs_are_those_of_evaluate() -> None:
    for seed in range(150):
        quick, rng = Quick(random_problems.random_problem(seed)), random.Random(seed)
        for _ in range(10):
            draft = random_draft(rng, quick)
            seconds, lack = quick.cost(draft)
            choice, order = quick.plan(draft)
            assert seconds == pytest.approx(evaluate(quick.problem, choice, order).makespan, rel=1e-12)
            assert lack == max(misfits(quick.problem, choice).values(), default=0)
            again = quick.draft(choice, order)
            assert quick.cost(again)[0] <= seconds * (1 + 1e-12)
