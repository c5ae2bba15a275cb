"""How the master's core ends a run that cannot go on: deaths, deadlines, failures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from core_workers import Workers, abort_text, started
from scenes import grpo, place

from realflow.runtime.core import Core
from realflow.runtime.dispatches import Dispatches
from realflow.runtime.events import Abort, Tick, WorkerLost
from realflow.runtime.messages import (
    DispatchDone,
    Failed,
    Ready,
)


def test_a_run_that_cannot_go_on_says_what_waits() -> None:
    graph = grpo(second=1)
    circle = {"greedy": {"x": "grade"}, "grade": {"completion": "greedy_completion"}}
    calls = [replace(call, reads=circle.get(call.name, call.reads)) for call in graph.calls]
    core = Core(place(replace(graph, calls=tuple(calls)), 1, {}))
    workers, out = Workers(core.plan, 0), core.handle(Ready(0, 0.0), 0.0)
    while not any(isinstance(instruction, Abort) for instruction in out):
        for instruction in out:
            workers.take(instruction)
        event = workers.events()[0]
        workers.happened(event)
        out = core.handle(event, 0.0)
    text = abort_text(out)
    assert "no call is under way and none can start" in text
    assert "greedy@0 waits for 8 samples of grade" in text
    assert "grade@0 waits for 8 samples of greedy" in text
    assert "train@0 waits for weights of actor (0 of 0 train dispatches are done), greedy" in text
    assert "reward@0" not in text, "it has finished"


def test_a_lost_worker_is_named_with_what_it_did() -> None:
    core = started(place(grpo(), 2, {}))
    text = abort_text(core.handle(WorkerLost(1, "has died"), 1.0))
    assert "rank 1 has died during rollout@0" in text
    assert "rank 0: rollout@0" in text
    assert core.handle(Tick(), 2.0) == []


def test_a_worker_lost_before_it_was_ready() -> None:
    core = Core(place(grpo(), 2, {}))
    assert "rank 1 has died during start-up" in abort_text(core.handle(WorkerLost(1, "has died"), 0.0))


def test_a_deadline() -> None:
    core = started(place(grpo(), 2, {}, deadline_floor_seconds=10.0))
    assert core.handle(Tick(), 9.0) == []
    assert "rollout@0 is past its deadline of 10 s without progress; not finished on rank 0, 1" in abort_text(
        core.handle(Tick(), 11.0)
    )


def test_a_deadline_runs_from_when_all_ranks_come_to_a_dispatch() -> None:
    """A short call that is queued behind a long one is not late because that one is long."""
    plan = place(grpo(), 2, {}, deadline_floor_seconds=10.0)
    long = {"rollout": replace(plan.calls["rollout"], predicted_seconds=50.0)}
    plan = replace(plan, calls={**plan.calls, **long}, deadline_factor=2.0)
    found = Dispatches(plan)
    ranks: dict[int, list[int]] = {0: [], 1: []}
    found.start("rollout@0", 0, "rollout", ranks, 0.0)
    found.start("ref@0", 0, "ref", ranks, 1.0)
    found.start("reward@0.0", 0, "reward", {0: [1]}, 1.0)
    limits = {name: found[name].deadline for name in ("rollout@0", "ref@0", "reward@0.0")}
    function = 1.0 + 2 * plan.graph.call("reward").timeout
    assert limits == {"rollout@0": 100.0, "ref@0": math.inf, "reward@0.0": function}, "functions do not queue"
    found.done(found["reward@0.0"], 0, 2.0)
    assert found.overdue(99.0) is None
    found.done(found.reported("rollout@0", 0, 90.0), 0, 90.0)
    assert found.overdue(189.0) is None, "rank 1 still works on the long one, and 0 waits for it"
    assert "rollout@0 is past its deadline of 100 s" in str(found.overdue(191.0))
    found.done(found.reported("rollout@0", 1, 180.0), 1, 180.0)
    assert found.overdue(189.0) is None
    assert "ref@0 is past its deadline of 10 s" in str(found.overdue(191.0))
    found.reported("ref@0", 1, 185.0)
    assert found.overdue(194.0) is None
    with pytest.raises(AssertionError, match="before its turn"):
        found.start("credit@0.0", 0, "credit", {0: [1]}, 190.0)
        found.start("credit@0.1", 0, "credit", {0: [2]}, 190.0)
        found.done(found["credit@0.1"], 0, 190.0)


def test_a_failure_names_call_rank_and_cause() -> None:
    core = started(place(grpo(), 2, {}))
    text = abort_text(core.handle(Failed(1, "rollout@0", "no memory", "Traceback ..."), 1.0))
    assert text.startswith("rollout@0 failed on rank 1: no memory\nTraceback ...")


def test_a_report_of_something_unknown_is_our_own_bug() -> None:
    core = started(place(grpo(), 2, {}))
    with pytest.raises(AssertionError, match="does not run"):
        core.handle(DispatchDone("train@0", 0), 1.0)
