"""Evaluations between steps, against simulated workers; the best checkpoint; what is told of rewards."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from core_workers import PLACES, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import grpo, place

from realflow.graph.evaluate import EVAL, SCORE
from realflow.runtime.added import completed
from realflow.runtime.best import BEST, keep_if_best, read_best
from realflow.runtime.events import Finished, Saved, StepDone
from realflow.runtime.messages import Execute, Feed, Open, Save
from realflow.runtime.readiness import active_calls, main_rollout
from realflow.runtime.stats import eval_means


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    where=st.sampled_from(PLACES),
    every=st.sampled_from([1, 2, 3, 9]),
    keep_best=st.booleans(),
    refill=st.sampled_from([None, 2]),
    second=st.sampled_from([None, 2]),
)
def test_each_evaluation_sees_the_weights_after_its_step(
    seed: int, where: tuple, every: int, keep_best: bool, refill: int | None, second: int | None
) -> None:
    graph = grpo(steps=5, examine=every, keep_best=keep_best, refill=refill, second=second)
    graph = replace(graph, checkpoint_every=4)
    workers, told = simulate(place(graph, *where), seed, drops=lambda group: group % 7 == 3)
    assert isinstance(told[-1], Finished)
    due = [step for step in range(5) if (step + 1) % every == 0 or step == 4]
    assert {step for call, step, _ in workers.versions if call == EVAL} == set(due)
    assert all(v == 2 * (step + 1) for call, step, v in workers.versions if call == EVAL)
    opened = [m for m in workers.taken if isinstance(m, Open) and m.call == EVAL]
    assert {m.dispatch for m in opened} == {f"{EVAL}@{step}" for step in due}
    assert {m.max_new_tokens for m in opened} == {8}
    judged = {step: set() for step in due}
    for message in workers.taken:
        if isinstance(message, Execute) and message.call == SCORE:
            judged[message.step] |= set(message.shards[0])
    assert judged == {step: set(range(15)) for step in due}, "the same prompts each time"
    done = [t for t in told if isinstance(t, StepDone)]
    assert [t.step for t in done] == [0, 1, 2, 3, 4]
    assert ["timing_s/eval" in t.metrics for t in done] == [step in due for step in range(5)]
    assert all(early.ended <= late.started for early, late in pairwise(done))
    saves = {3, 4} | (set(due) if keep_best else set())
    assert {t.step for t in told if isinstance(t, Saved)} == saves
    assert not any(workers.store.values()), "fields were left behind"


def test_an_evaluation_comes_between_training_and_the_checkpoint() -> None:
    workers, _ = simulate(place(grpo(steps=2, examine=1, keep_best=True), 2, {}), 3)
    names = [m.dispatch for m in workers.taken if isinstance(m, Open | Execute | Save)]
    order = [names.index(name) for name in ("train@0", f"{EVAL}@0", f"{SCORE}@0.0", "save:actor@0")]
    assert order == sorted(order) and names.index("save:actor@0") < names.index("rollout@1")
    fed = [g for m in workers.taken if isinstance(m, Feed) and m.dispatch == f"{EVAL}@0" for g in m.groups]
    assert sorted(fed) == [0, 1, 2, 3, 4]


def test_no_step_runs_the_calls_of_an_evaluation() -> None:
    graph = completed(place(grpo(examine=1), 1, {})).graph
    assert {EVAL, SCORE} <= {call.name for call in graph.calls}
    assert not {EVAL, SCORE} & {call.name for call in active_calls(graph, 0)}
    rollout = main_rollout(graph)
    assert rollout is not None and rollout.name == "rollout"


def test_means_of_rewards() -> None:
    rewards = [1.0, 0.0, None, 0.5, 1.5]
    assert eval_means(rewards, [None] * 5) == {
        "eval/missing": [1.0, 5.0],
        "eval/reward/mean": [3.0, 4.0],
        "eval/pass@1": [2.0, 4.0],
    }
    found = eval_means(rewards, ["a", "b", "b", "b", "a"])
    assert found["eval/a/reward/mean"] == [2.5, 2.0] and found["eval/a/pass@1"] == [2.0, 2.0]
    assert found["eval/b/reward/mean"] == [0.5, 2.0] and found["eval/b/pass@1"] == [0.0, 2.0]
    assert eval_means([None], ["a"]) == {"eval/missing": [1.0, 1.0]}, "missing is never 0"


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    rewards = {1: 0.25, 2: 0.5, 3: 0.5, 4: 0.125, 5: 0.75}
    kept = []
    for step, reward in rewards.items():
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        (folder / "actor").mkdir(parents=True)
        (folder / "actor" / "weights").write_text(str(step))
        kept.append(keep_if_best(tmp_path, folder, step, reward))
        if step == 2:
            assert os.stat(folder / "actor" / "weights").st_nlink == 2, "a link, not a copy"
            os.remove(folder / "actor" / "weights")
    assert kept == [True, True, False, False, True]
    assert read_best(tmp_path) == (5, 0.75)
    best = tmp_path / "checkpoints" / BEST
    assert (best / "actor" / "weights").read_text() == "5"
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob(".*")) == []
    assert json.loads((best / "best.json").read_text()) == {"step": 5, "reward": 0.75}


def test_without_links_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    folder = tmp_path / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("1")
    assert keep_if_best(tmp_path, folder, 1, 0.0)
    assert (tmp_path / "checkpoints" / BEST / "weights").read_text() == "1"
