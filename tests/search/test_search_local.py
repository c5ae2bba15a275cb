"""Annealing: plans that fit, on any machine the same, and not far from the best."""

from __future__ import annotations

import random
from dataclasses import replace

import enumerator
import large_problems
import pytest
import random_problems

from planner.search import Problem, Solution, evaluate, misfits
from planner.search.dominated import undominated
from planner.search.exact import solve_exact
from planner.search.local import improve


def makespan(problem: Problem, seed: int, rounds: int) -> float:
    plan = improve(problem, seed=seed, rounds=rounds)
    assert plan is not None and not misfits(problem, plan[0])
    return evaluate(problem, *plan).makespan


def test_small_problems_are_solved_nearly_always() -> None:
    above = []
    for seed in range(60):
        problem = random_problems.random_problem(seed, most=300)
        best = enumerator.best_plan(problem)
        plan = improve(problem, seed=seed, rounds=600)
        if best is None:
            assert plan is None
        elif plan is not None:
            assert not misfits(problem, plan[0])
            seconds = evaluate(problem, *plan).makespan
            assert seconds >= best.seconds * (1 - 1e-12)
            above.append(seconds / best.seconds - 1)
        else:
            above.append(1.0)
    assert sum(one > 0.04 for one in above) <= 0.05 * len(above)


def test_the_same_seed_gives_the_same_plan() -> None:
    problem = large_problems.ppo(128)
    one, other = (improve(problem, seed=7, rounds=300) for _ in range(2))
    assert one == other


def test_never_worse_than_the_start() -> None:
    for seed in range(30):
        problem = random_problems.random_problem(seed)
        problem = replace(problem, memory_bytes=(99,) * problem.devices)
        rng = random.Random(seed)
        choice = random_problems.random_choice(rng, problem)
        order = random_problems.random_order(rng, problem, [])
        plan = improve(problem, seed=seed, rounds=5, start=(choice, order))
        assert plan is not None
        assert evaluate(problem, *plan).makespan <= evaluate(problem, choice, order).makespan * (1 + 1e-12)


def test_sixteen_devices_are_within_4_percent_of_the_proven_optimum() -> None:
    problem = undominated(large_problems.ppo(16)).problem
    plan = improve(problem, seed=0, rounds=20_000)
    assert plan is not None
    timeline = evaluate(problem, *plan)
    hint = Solution(plan[0], plan[1], timeline, timeline.makespan, 0.0, 0)
    choice, order, bound = solve_exact(problem, seed=0, seconds=30, hint=hint)
    best = evaluate(problem, choice, order).makespan
    assert bound >= best * (1 - 1e-6)
    assert best <= timeline.makespan <= 1.04 * best


@pytest.mark.full
@pytest.mark.parametrize("devices", [128, 1024])
def test_large_clusters_are_within_4_percent_of_the_best_known(devices: int) -> None:
    for problem in (large_problems.ppo(devices), large_problems.eight(devices)):
        found = [makespan(problem, seed, 60_000) for seed in range(3)]
        best = min([*found, makespan(problem, 9, 250_000)])
        assert max(found) <= 1.04 * best, [one / best for one in found]
