"""The scenarios of experiments/planner: their graphs check, and rivals mean what the search means."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "experiments" / "planner"), str(ROOT / "experiments")]

from cases import CASES, PER_NODE, cluster, models  # noqa: E402
from rivals import Annealer, megatron, uniform  # noqa: E402
from table import write_table  # noqa: E402

from planner.options import Ask, build  # noqa: E402
from planner.search import Problem, Work, evaluate, misfits, solve  # noqa: E402
from planner.search.problem import Call, Move, Option, Placed, Slot  # noqa: E402


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_graphs_are_right_and_configs_are_enough(case) -> None:
    known = models(case)
    assert set(known.decoders) == set(known.graph.models) and not known.cards
    assert len(cluster(case).devices) == case.devices
    assert sum(call.model is not None for call in known.graph.calls) <= case.calls


def test_there_are_sixteen_and_what_is_asked_of_them() -> None:
    assert len({case.name for case in CASES}) == 16
    devices = sorted(case.devices for case in CASES)
    assert devices == [8, 8, 16, 32, 64, *[128] * 7, 256, *[1024] * 3]
    asked = {case.name: (case.seconds, case.gap("powers"), case.gap("any")) for case in CASES}
    assert asked["ppo-7b-7b-16"] == (10.0, 1e-4, 1e-4)
    assert asked["ppo-7b-7b-128"] == (30.0, 0.01, 0.05)
    assert asked["remax-32b-1024"] == (60.0, 0.01, 0.05)
    assert asked["eight-calls-128"] == (60.0, 0.05, 0.05)


def small_problem() -> Problem:
    """Two models, three calls, four devices: a trained one whose weights move, and memory that binds."""
    quarter = tuple(range(i, i + 1) for i in range(4))
    half, whole = (range(2), range(2, 4)), (range(4),)

    def options(seconds: float, static: int) -> tuple[Option, ...]:
        return (
            Option(quarter, seconds, static, 10, "d1"),
            Option(half, seconds * 0.55, static, 10, "d2"),
            Option(half, seconds * 0.6, static // 2, 10, "t2"),
            Option(whole, seconds * 0.35, static // 2, 10, "d2t2"),
        )

    names = ("d1", "d2", "t2", "d2t2")
    return Problem(
        (100,) * 4,
        (
            Call("rollout", options(8.0, 30), (), "actor"),
            Call("ref", options(5.0, 40), ("rollout",), "ref"),
            Call("train", options(9.0, 50), ("ref",), "actor", trains=True),
        ),
        {("actor", one, other): Move(0.1, 0.2) for one, other in product(names, names)},
    )


def test_annealing_finds_what_the_search_proves() -> None:
    problem = small_problem()
    best = solve(problem, work=Work(solver=2.0, rounds=500))
    assert best.gap <= 1e-6
    found = Annealer(problem, seed=1).run(1.5)
    assert found.makespan is not None
    assert best.makespan * (1 - 1e-9) <= found.makespan <= best.makespan * 1.05


def test_what_annealing_counts_is_what_evaluate_and_misfits_count() -> None:
    """For random plans: on fewer devices, the makespan is the same, and so is whether it fits."""
    problem = small_problem()
    annealer = Annealer(problem, seed=3)
    state, seen = annealer.first(), set()
    for _ in range(300):
        state = annealer.changed(state)
        cost, fits = annealer.cost(state)
        whole = evaluate(problem, state.choice, annealer.order(state)).makespan
        assert fits == (not misfits(problem, state.choice))
        assert cost == pytest.approx(whole) if fits else cost > whole * 1.04
        seen.add(fits)
    assert seen == {True, False}


def test_rules_are_plans_of_the_same_problem() -> None:
    """On 8 devices: no rule is below the bound of the search, and each has the layouts that it says."""
    case = next(case for case in CASES if case.name == "grpo-1.5b-8")
    known, machines = models(case), cluster(case)
    best = solve(build(known, machines, Ask()).problem, work=Work(solver=1.0, rounds=300))
    for rule in (uniform, megatron):
        found = rule(known, machines, PER_NODE, [])
        assert found.makespan is not None and found.makespan >= best.bound * (1 - 1e-6)
    assert megatron(known, machines, PER_NODE, []).words.startswith("rollout d")


def test_the_table_says_where_a_rival_is_better(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "grpo-1.5b-8")
    folder = tmp_path / case.name
    folder.mkdir()
    searched = {"options": 5, "considered": 9, "seconds": 2.0, "cpu_seconds": 1.5, "makespan": 10.0,
                "bound": 9.9, "gap": 0.01, "plan": {}}  # fmt: skip

    def put(name: str, found: dict) -> None:
        (folder / f"{name}.json").write_text(json.dumps({"results": found}))

    put("search-any-0", searched)
    put("search-powers-0", {**searched, "gap": 0.0, "bound": 10.0})
    put("uniform", {"makespan": 12.0})
    put("anneal-0-120s", {"makespan": 11.0})
    put("anneal-1-120s", {"makespan": 13.0})
    put("anneal-0-5s", {"makespan": 1.0})
    line = write_table(tmp_path, CASES, 120.0).splitlines()[2]
    assert "| +20.0% |" in line and "+10.0%, +20.0% (2)" in line
    assert "no: any" in line and "above" not in line, "a gap of 1 % is not proven"
    put("megatron", {"makespan": 9.95})
    assert "above a rival" in write_table(tmp_path, CASES, 120.0)


def test_annealing_keeps_to_the_graphs_order() -> None:
    annealer = Annealer(small_problem(), seed=0)
    state = annealer.first()
    state.priority.update({"train": -1.0, "ref": -0.9, "move:rollout": 9.0})
    assert [slot.what for slot in annealer.order(state) if ":" not in slot.what] == [
        "rollout",
        "ref",
        "train",
    ]
    state.choice["rollout"] = Placed(1, range(2))
    state.choice["train"] = Placed(3, range(4))
    state.priority["move:rollout"] = -5.0
    assert annealer.order(state)[0] == Slot("move:rollout")
