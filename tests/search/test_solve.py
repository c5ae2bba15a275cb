"""solve(): plans that are best and said to be, whatever the calls are called, on any machine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import enumerator
import large_problems
import pytest
import random_problems

from planner.search import (
    Call,
    Infeasible,
    Move,
    Option,
    Problem,
    Solution,
    Work,
    evaluate,
    misfits,
    solve,
)
from planner.search.bounds import simple_bound
from planner.search.classes import solve_classes
from planner.search.groups import grouped

LITTLE = Work(solver=10.0, rounds=500)
CLOSE = 3e-6  # what counting in ticks may leave


def check(problem: Problem, seed: int = 0) -> Solution | None:
    """Against every plan there is."""
    best = enumerator.best_plan(problem)
    if best is None:
        with pytest.raises(Infeasible) as failure:
            solve(problem, seed=seed, work=LITTLE)
        assert failure.value.short == enumerator.least_shortage(problem) > 0
        return None
    found = solve(problem, seed=seed, work=LITTLE)
    assert not misfits(problem, found.choice)
    assert evaluate(problem, found.choice, found.order) == found.timeline
    assert found.timeline.makespan == found.makespan
    assert found.makespan == pytest.approx(best.seconds, rel=CLOSE)
    assert found.makespan >= best.seconds * (1 - 1e-12)
    assert best.seconds * (1 - 10 * CLOSE) <= found.bound <= best.seconds * (1 + 1e-12)
    assert simple_bound(problem, grouped(problem)) <= best.seconds
    return found


@pytest.mark.parametrize("start", range(0, 100, 25))
def test_plans_are_the_best_of_all(start: int) -> None:
    for seed in range(start, start + 25):
        check(random_problems.random_problem(seed, most=500))


@pytest.mark.full
@pytest.mark.parametrize("start", range(2000, 2500, 50))
def test_500_solved_problems_are_the_best_of_all(start: int) -> None:
    for seed in range(start, start + 50):
        check(random_problems.random_problem(seed))


@pytest.mark.parametrize("light", [True, False])
def test_no_plan_is_below_the_bound_of_the_class_model(light: bool) -> None:
    """Proven or not: also where the solver has little time."""
    for seed in range(8):
        problem = random_problems.random_problem(seed, most=500)
        if (best := enumerator.best_plan(problem)) is None:
            continue
        for seconds in (0.001, 1.0):
            found = solve_classes(
                problem, grouped(problem), seed=seed, seconds=seconds, horizon=2 * best.seconds, light=light
            )
            assert found.bound <= best.seconds * (1 + 1e-12)
            assert found.spent < 2 * seconds + 0.1


LARGE = {
    "ppo-64": (lambda: large_problems.ppo(64), 1e-4),
    "grpo-32-any": (lambda: large_problems.grpo(32, any_length=True), 0.05),
}
LARGER = {
    "ppo-128": (lambda: large_problems.ppo(128), 0.01),
    "ppo-1024": (lambda: large_problems.ppo(1024), 0.01),
    "ppo-128-little-memory": (lambda: large_problems.ppo(128, gigabytes=40), 0.01),
    "ppo-70b-128-any": (lambda: large_problems.ppo(128, "70B", "70B", any_length=True), 0.05),
    "eight-128": (lambda: large_problems.eight(128), 0.05),
    "eight-128-any": (lambda: large_problems.eight(128, any_length=True), 0.05),
    "async-128": (lambda: large_problems.grpo(128, overlap=2, follows=True), 0.05),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_problems_are_proven(name: str) -> None:
    build, most = LARGE[name]
    problem = build()
    found = solve(problem, work=Work(solver=10.0, rounds=2000))
    assert not misfits(problem, found.choice)
    assert evaluate(problem, found.choice, found.order).makespan == found.makespan
    assert found.gap <= most
    assert found.bound > 1.01 * simple_bound(problem, grouped(problem)) or found.gap < 1e-4


@pytest.mark.full
@pytest.mark.parametrize("name", LARGER)
def test_larger_problems_are_almost_proven(name: str) -> None:
    build, most = LARGER[name]
    problem = build()
    found = solve(problem)
    assert not misfits(problem, found.choice)
    assert found.gap <= most


def renamed(problem: Problem, names: Mapping[str, str], models: Mapping[str | None, str | None]) -> Problem:
    """The same with other names of calls and models, and the calls in the order of their new names."""
    calls = [
        replace(call, name=names[call.name], after=tuple(names[name] for name in call.after),
                model=models[call.model])
        for call in problem.calls
    ]  # fmt: skip
    moves = {(str(models[model]), *layouts): move for (model, *layouts), move in problem.moves.items()}
    follows = {str(models[one]): str(models[other]) for one, other in problem.follows.items()}
    calls.sort(key=lambda call: call.name)
    return replace(problem, calls=tuple(calls), moves=moves, follows=follows)


def test_names_mean_nothing() -> None:
    """Nor does the order of calls, but that of two which the same move serves."""
    for seed in range(300, 325):
        problem = random_problems.random_problem(seed, most=300)
        names = [call.name for call in problem.calls]
        mixed = random.Random(seed).sample(names, len(names))
        told = dict(zip(names, (f"z{name}" for name in mixed), strict=True))
        models = {None: None, "actor": "shared!", "shared": "a", "other": "actor", "copy": "b"}
        if enumerator.best_plan(problem) is None:
            continue
        one = solve(problem, work=LITTLE)
        other = solve(renamed(problem, told, models), work=LITTLE)
        assert one.makespan == pytest.approx(other.makespan, rel=CLOSE)
        assert one.considered == other.considered


def test_the_same_seed_gives_the_same_plan_on_any_machine(tmp_path: Path) -> None:
    """In processes whose sets of texts are in other orders, and with other work beside."""
    script = tmp_path / "plan.py"
    script.write_text(
        "import large_problems\n"
        "from planner.search import Work, solve\n"
        "for problem in (large_problems.grpo(24, any_length=True), large_problems.ppo(16, overlap=2)):\n"
        "    found = solve(problem, seed=3, work=Work(solver=0.5, rounds=300))\n"
        "    print(found.choice, found.order, found.bound)\n"
    )
    here = Path(__file__).parent
    told = set()
    for hashes in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": f"{here}:{here.parents[1]}"}
        done = subprocess.run(
            [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        told.add(done.stdout)
    assert len(told) == 1


def one_of(name: str, size: int, devices: int, seconds: float = 1.0, **more: object) -> Call:
    places = tuple(range(start, start + size) for start in range(0, devices, size))
    return Call(name, (Option(places, seconds, **more),))  # type: ignore[arg-type]


def test_what_cannot_be_together_is_named_with_the_bytes() -> None:
    calls = (
        one_of("small", 2, 64, static_bytes=1),
        one_of("wide", 64, 64, static_bytes=50),
        one_of("large", 32, 64, static_bytes=37),
        one_of("other", 16, 64, static_bytes=3),
    )
    with pytest.raises(Infeasible) as failure:
        solve(Problem((80,) * 64, calls), work=LITTLE)
    assert (failure.value.calls, failure.value.short) == (("wide", "large"), 7)
    assert "wide, large cannot be placed together: 7 bytes too few" in str(failure.value)
    assert solve(Problem((87,) * 64, calls), work=LITTLE).gap < 1e-5


def test_one_call_alone_may_be_too_large() -> None:
    calls = (one_of("fine", 4, 32, static_bytes=8), one_of("huge", 8, 32, static_bytes=60, active_bytes=25))
    with pytest.raises(Infeasible) as failure:
        solve(Problem((80,) * 32, calls), work=LITTLE)
    assert (failure.value.calls, failure.value.short) == (("huge",), 5)


def test_calls_of_one_model_share_what_they_hold() -> None:
    calls = (
        replace(one_of("rollout", 32, 32, static_bytes=50, layout="d32"), model="actor"),
        replace(one_of("reference", 32, 32, static_bytes=45, layout="d32"), model="actor"),
    )
    assert solve(Problem((60,) * 32, calls), work=LITTLE).gap < 1e-5
    apart = (calls[0], replace(calls[1], model="another"))
    with pytest.raises(Infeasible):
        solve(Problem((60,) * 32, apart), work=LITTLE)


def test_devices_of_several_kinds() -> None:
    """Fast ones with little memory, slow ones with much: each call goes where it is best, both at once."""
    fast = tuple(range(start, start + 8) for start in range(0, 32, 8))
    slow = tuple(range(start, start + 8) for start in range(32, 64, 8))

    def either(name: str, on_fast: float, on_slow: float, size: int) -> Call:
        return Call(name, (Option(fast, on_fast, size), Option(slow, on_slow, size)))

    calls = (
        *(either(f"a{n}", 1.0, 3.0, 20) for n in range(4)),
        *(either(f"b{n}", 1.0, 3.0, 60) for n in range(4)),
    )
    found = solve(Problem((40,) * 32 + (80,) * 32, calls), work=LITTLE)
    assert found.makespan == pytest.approx(3.0)
    assert found.gap < 1e-5
    assert all(found.choice[f"b{n}"].place.start >= 32 for n in range(4))


def test_a_pinned_call_stays_where_it_is() -> None:
    free = tuple(range(start, start + 8) for start in range(0, 64, 8))
    calls = (
        Call("pinned", (Option((range(8, 24),), 2.0),)),
        *(Call(f"c{n}", (Option(free, 1.0),)) for n in range(6)),
    )
    found = solve(Problem((1,) * 64, calls), work=LITTLE)
    assert found.choice["pinned"].place == range(8, 24)
    assert found.makespan == pytest.approx(2.0)
    assert found.gap < 1e-5


@pytest.mark.parametrize("width", (1, 8))
def test_places_that_counts_alone_would_promise(width: int) -> None:
    """Of 7 nodes one in the midst is taken: two runs of 3 find enough nodes, but not side by side. Counts say
    a bound that is too low, never a plan that is none; where the explicit model is small it says the rest."""
    runs = tuple(range(at * width, (at + 3) * width) for at in range(5))
    pinned = Call("pinned", (Option((range(2 * width, 3 * width),), 1.0),))
    calls = (pinned, Call("a", (Option(runs, 1.0),)), Call("b", (Option(runs, 1.0),)))
    found = solve(Problem((1,) * (7 * width), calls), work=LITTLE)
    assert found.makespan == pytest.approx(2.0)
    assert found.bound == pytest.approx(2.0 if width == 1 else 1.0, rel=1e-5)


def test_steps_that_overlap_are_planned_for_throughput() -> None:
    """Rollout for the next step beside training for this one: the devices are divided by their work."""
    places = {size: tuple(range(at, at + size) for at in range(0, 65 - size, 8)) for size in range(8, 65, 8)}

    def scaled(name: str, work: float, **more: object) -> Call:
        options = (Option(runs, work / size) for size, runs in places.items())
        return Call(name, tuple(options), **more)  # type: ignore[arg-type]

    calls = (scaled("rollout", 300.0), scaled("train", 100.0, after=("rollout",)))
    apart, together = (solve(Problem((1,) * 64, calls, overlap=n), work=LITTLE) for n in (1, 2))
    assert apart.makespan == pytest.approx(400 / 64)
    assert together.makespan == pytest.approx(400 / 64)
    slower = tuple(replace(o, seconds=3.0 + o.seconds) for o in calls[1].options)
    calls = (calls[0], replace(calls[1], options=slower))
    apart, together = (solve(Problem((1,) * 64, calls, overlap=n), work=LITTLE) for n in (1, 2))
    assert apart.makespan == pytest.approx(3 + 400 / 64)
    assert together.makespan == pytest.approx(300 / 40)  # 40 devices roll out, 24 train for 7.17 s
    assert together.gap < 1e-5
    assert {entry.stage for entry in together.timeline.entries} == {0, 1}


def test_moves_are_operations_of_their_own() -> None:
    """Weights go to the rollout's devices while others still work there; glued to it they would wait."""
    half = (range(4), range(4, 8))
    calls = (
        Call("first", (Option(half, 4.0),)),
        Call("rollout", (Option(half, 3.0, layout="r"),), ("first",), "actor"),
        Call("train", (Option(half, 5.0, layout="t"),), ("rollout",), "actor", trains=True),
    )
    found = check(Problem((1,) * 8, calls, {("actor", "t", "r"): Move(1.0, 2.0)}))
    assert found is not None and found.makespan == pytest.approx(4.0 + 3.0 + 5.0)
