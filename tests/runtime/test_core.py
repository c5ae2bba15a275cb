"""The master's core against simulated workers, in any order of legal events."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from core_workers import PLACES, Workers, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import grpo, place

from realflow.graph.types import Sampling
from realflow.runtime.core import Core
from realflow.runtime.events import Finished, Saved, StepDone, To
from realflow.runtime.messages import (
    Execute,
    Open,
    Ready,
)
from realflow.runtime.readiness import main_rollout, token_sources
from realflow.runtime.record import MASK, RECORD, with_record


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    where=st.sampled_from(PLACES),
    evaluate=st.sampled_from([None, 2]),
    second=st.sampled_from([None, 1, 2]),
    train_every=st.sampled_from([None, 2, 5]),
    probe=st.sampled_from([None, "actor"]),
    staleness=st.sampled_from([0, 0, 1, 2]),
)
def test_any_order_of_legal_events_completes(
    seed: int,
    where: tuple,
    evaluate: int | None,
    second: int | None,
    train_every: int | None,
    probe: str | None,
    staleness: int,
) -> None:
    graph = grpo(steps=5, evaluate=evaluate, second=second, train_every=train_every, probe=probe)
    graph = replace(graph, max_staleness=staleness, checkpoint_every=2)
    plan = place(graph, *where)
    workers, told = simulate(plan, seed)
    assert [t.step for t in told if isinstance(t, StepDone)] == [0, 1, 2, 3, 4]
    assert isinstance(told[-1], Finished)
    assert sorted(t.step for t in told if isinstance(t, Saved)) == [1, 3, 4]
    assert set(workers.saved) == {(s, 2 * ((s + 1) // (train_every or 1))) for s in (1, 3, 4)}
    for orders in workers.orders.values():
        growing = all(a < b for a, b in pairwise(orders))
        assert growing, "a rank got ordered messages out of order, or two of one number"
    assert not any(workers.store.values()), "fields were left behind"
    opened = [(call, step) for call, step, _ in workers.versions]
    steps = {step for call, step in opened if call == "rollout"}
    assert steps == {0, 1, 2, 3, 4}
    assert {step for call, step in opened if call == "greedy"} == {None: set(), 1: steps, 2: {1, 3}}[second]
    seen: dict[tuple[str, int], set[int]] = defaultdict(set)
    for call, step, version in workers.versions:
        due = step // (train_every or 1)
        least = due if call == "train" else max(0, due - staleness)
        assert 2 * least <= version <= 2 * due, "not the weights after the trainings so far"
        seen[call, step].add(version)
    assert all(len(versions) == 1 for versions in seen.values()), "ranks of a call had different weights"


@pytest.mark.parametrize("seed", range(5))
def test_rollouts_of_a_later_step_do_not_wait_for_training(seed: int) -> None:
    """With a staleness of 1 the weights are moved before they are trained again."""
    graph = replace(grpo(steps=5), max_staleness=1)
    workers, told = simulate(place(graph, 2, {"rollout": (0,), "train": (1,)}), seed)
    assert isinstance(told[-1], Finished)
    found = {step: version for call, step, version in workers.versions if call == "rollout"}
    assert found == {0: 0, 1: 0, 2: 2, 3: 4, 4: 6}


@pytest.mark.parametrize("seed", range(20))
def test_training_waits_for_every_other_call_of_its_model(seed: int) -> None:
    """`probe` reads the actor's weights of this step, and nothing that train reads depends on it."""
    graph = grpo(probe="actor")
    workers, told = simulate(place(graph, 4, {**PLACES[2][1], "probe": (3,)}), seed)
    assert isinstance(told[-1], Finished)
    for step in range(graph.steps):
        assert workers.dispatched.index(f"probe@{step}") < workers.sent_after[f"train@{step}"]


def test_same_events_same_instructions() -> None:
    plan = place(grpo(), 4, PLACES[2][1])
    workers, _ = simulate(plan, 7)
    replays = []
    for _ in range(2):
        core = Core(plan)
        out = [core.handle(Ready(rank, 0.1), 0.0) for rank in range(4)]
        out += [core.handle(event, float(i)) for i, event in enumerate(workers.log)]  # type: ignore[arg-type]
        replays.append(out)
    assert replays[0] == replays[1]


def test_minibatches_do_not_depend_on_the_layout() -> None:
    def formed(devices: int, ranks: dict) -> list[list[set[int]]]:
        plan = place(grpo(steps=1, prompts=6, minibatches=3), devices, ranks)
        core, workers = Core(plan), Workers(plan, 1)
        found: dict[int, set[int]] = defaultdict(set)
        todo = [Ready(rank, 0.0) for rank in range(devices)]
        while todo or workers.events():
            event = todo.pop() if todo else workers.events()[0]
            if not isinstance(event, Ready):
                workers.happened(event)
            for instruction in core.handle(event, 0.0):
                if isinstance(instruction, To):
                    workers.take(instruction)
                    message = instruction.message
                    if isinstance(message, Execute) and message.call == "train":
                        for index, shard in enumerate(message.shards):
                            found[index] |= set(shard)
        return [[found[i]] for i in sorted(found)]

    alone = formed(1, {})
    assert [len(b[0]) for b in alone] == [4, 4, 4]
    assert formed(3, {}) == alone == formed(3, {"train": (1, 2), "rollout": (0,)})


@pytest.mark.parametrize("whole", [True, False])
def test_groups_stay_whole_where_the_loss_looks_at_them(whole: bool) -> None:
    """Samples of a prompt go to one replica; without such a loss some prompt is divided (the control)."""
    graph = grpo(steps=1, prompts=3, samples=3, minibatches=1)
    calls = [
        replace(call, decl=replace(call.decl, scope="group")) if call.op == "train" and whole else call
        for call in graph.calls
    ]
    plan = place(replace(graph, calls=tuple(calls)), 2, {"train": (0, 1)})
    workers, _ = simulate(plan, 3)
    trained = [m for m in workers.taken if isinstance(m, Execute) and m.call == "train"]
    shards = [set(message.shards[0]) for message in trained]
    assert sorted(sample for shard in shards for sample in shard) == list(range(9))
    homes = [{sample // 3 for sample in shard} for shard in shards]
    assert (sum(map(len, homes)) == 3) == whole


@pytest.mark.parametrize(("start", "trained"), [(0, 0), (1, 0), (2, 1), (5, 2)])
def test_a_resumed_run_counts_the_trainings_that_were_due(start: int, trained: int) -> None:
    core = Core(place(grpo(steps=8, train_every=2, minibatches=2), 1, {}), start_step=start)
    assert core.versions == {"actor": 2 * trained}


def test_record_reads_what_samples_have() -> None:
    plan = with_record(place(grpo(), 2, {}))
    record = plan.graph.call(RECORD)
    assert set(record.reads.values()) == {"completion", "rewards", "advantages", "loss_mask"}


def test_the_main_rollout_is_the_one_that_is_trained_on() -> None:
    graph = grpo(second=1)
    assert graph.calls[0].name == "greedy"
    rollout = main_rollout(graph)
    assert rollout is not None
    assert rollout.name == "rollout"
    sources = token_sources(graph)
    assert sources["grade"] == sources["greedy"] == "greedy"
    assert {sources[name] for name in ("reward", "ref", "credit", "train")} == {"rollout"}
    rest = replace(graph, calls=tuple(call for call in graph.calls if call.name != "train"))
    first = main_rollout(rest)
    assert first is not None
    assert first.name == "greedy"


def test_periodic_rollouts_are_recorded_when_they_run() -> None:
    graph = grpo(second=2)
    alone = replace(graph, calls=graph.calls[:2])
    record = with_record(place(alone, 1, {})).graph.call(RECORD)
    assert record.every == 2
    assert record.reads == {"completion": "greedy_completion", "grade": "grade", MASK: "greedy_loss_mask"}


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_rollout_is_opened_with_the_limit_of_its_step(staleness: int) -> None:
    graph = replace(grpo(steps=5), max_staleness=staleness)
    staged = replace(graph.call("rollout"), sampling=Sampling(32, stages=((2, 8), (4, 16), (None, 32))))
    calls = tuple(staged if call.name == "rollout" else call for call in graph.calls)
    workers, _ = simulate(place(replace(graph, calls=calls), 2, {}), 4)
    opened = {m.step: m.max_new_tokens for m in workers.taken if isinstance(m, Open)}
    assert opened == {0: 8, 1: 8, 2: 16, 3: 16, 4: 32}
