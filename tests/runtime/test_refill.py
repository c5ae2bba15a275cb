"""Groups that leave a step and others in their place, against simulated workers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from core_workers import PLACES, Workers, simulate
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scenes import grpo, place

from realflow.graph.refill import REFILL, judges
from realflow.graph.types import Call, Graph
from realflow.runtime.added import completed
from realflow.runtime.carried import Carried
from realflow.runtime.core import Core
from realflow.runtime.events import Abort, Event, Finished, Instruction, Saved, StepDone, To
from realflow.runtime.messages import Execute, Feed, Free, Open, Ready
from realflow.runtime.readiness import StepReadiness


@dataclass(frozen=True)
class Expected:
    """A step as a loop would make it."""

    kept: list[int]
    dropped: list[int]
    rounds: int
    next_prompt: int


def expected(graph: Graph, most: int, drops: Callable[[int], bool]) -> list[Expected]:
    """The steps of a run."""
    steps: list[Expected] = []
    cursor = 0
    for _ in range(graph.steps):
        kept: list[int] = []
        dropped: list[int] = []
        rounds = 0
        while rounds < most and len(kept) < graph.prompts:
            drawn = range(cursor, cursor + graph.prompts - len(kept))
            cursor, rounds = drawn.stop, rounds + 1
            kept += [group for group in drawn if not drops(group)]
            dropped += [group for group in drawn if drops(group)]
        steps.append(Expected(kept, dropped, rounds, cursor))
    return steps


def judged(graph: Graph) -> frozenset[str]:
    refill = graph.call("rollout").refill
    assert refill is not None
    return judges(graph.calls, refill)


def seen_by(workers: Workers) -> dict[str, dict[int, list[int]]]:
    """Call -> step -> the samples that it was given."""
    seen: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for message in workers.taken:
        if isinstance(message, Execute):
            seen[message.call][message.step] |= {sample for shard in message.shards for sample in shard}
    return {call: {step: sorted(ids) for step, ids in found.items()} for call, found in seen.items()}


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    where=st.sampled_from(PLACES),
    most=st.integers(1, 4),
    residues=st.sets(st.integers(0, 10), max_size=8),
    second=st.sampled_from([None, 1, 2]),
    graded=st.sampled_from([None, "actor", "ref"]),
    probe=st.sampled_from([None, "actor"]),
    keeps=st.sampled_from([None, 1]),
    staleness=st.sampled_from([0, 0, 1]),
)
def test_a_step_has_the_groups_that_a_loop_would_give_it(
    seed: int,
    where: tuple,
    most: int,
    residues: set[int],
    second: int | None,
    graded: str | None,
    probe: str | None,
    keeps: int | None,
    staleness: int,
) -> None:
    """Whatever the layout and the order of events; every other call sees just those groups."""
    graph = grpo(steps=4, refill=most, graded=graded, second=second, probe=probe, keeps=keeps, minibatches=1)
    graph = replace(graph, max_staleness=staleness, checkpoint_every=2)
    plan = place(graph, *where)

    def drops(group: int) -> bool:
        return group % 11 in residues

    steps = expected(graph, most, drops)
    assume(all(step.kept for step in steps))
    workers, told = simulate(plan, seed, drops=drops)
    assert isinstance(told[-1], Finished)
    assert [t.metrics for t in told if isinstance(t, StepDone)] == [
        {"refill/rounds": s.rounds, "refill/kept": len(s.kept), "refill/dropped": len(s.dropped)}
        for s in steps
    ]
    assert {t.step: t.carried.next_prompt for t in told if isinstance(t, Saved)} == {
        step: steps[step].next_prompt for step in (1, 3)
    }
    seen = seen_by(workers)
    for call in completed(plan).graph.calls:
        if call.op == "generate":
            continue
        early = call.name in judged(graph) or call.name == REFILL
        for index, step in enumerate(steps):
            if (index + 1) % (call.every or 1) == 0:
                groups = sorted([*step.kept, *step.dropped]) if early else step.kept
                assert seen[call.name][index] == [s for g in groups for s in (2 * g, 2 * g + 1)], call.name
    assert not any(workers.store.values()), "fields were left behind"
    for orders in workers.orders.values():
        growing = all(a < b for a, b in pairwise(orders))
        assert growing


@pytest.mark.parametrize("seed", range(5))
def test_each_round_is_a_dispatch_and_what_is_dropped_is_freed(seed: int) -> None:
    graph = grpo(steps=1, refill=3, graded="ref", minibatches=1)
    workers, told = simulate(place(graph, 2, {}), seed, drops=lambda group: group in (1, 3, 5))
    assert told[0].metrics["refill/rounds"] == 3
    opened = [m.dispatch for m in workers.taken if isinstance(m, Open)]
    assert list(dict.fromkeys(opened)) == ["rollout@0", "rollout@0.1", "rollout@0.2"]
    fed = {m.dispatch: set() for m in workers.taken if isinstance(m, Feed)}
    for message in workers.taken:
        if isinstance(message, Feed):
            fed[message.dispatch] |= set(message.groups)
    assert fed == {"rollout@0": {0, 1, 2, 3}, "rollout@0.1": {4, 5}, "rollout@0.2": {6}}
    inferred = {m.dispatch for m in workers.taken if isinstance(m, Execute) and m.call in ("judge", "ref")}
    assert inferred == {"judge@0", "judge@0.1", "judge@0.2", "ref@0"}, "ref waits for the whole step"
    early = {(m.start, m.stop) for m in workers.taken if isinstance(m, Free) and "rewards" in m.fields}
    assert {(2, 4), (6, 8), (10, 12)} < early


def test_nothing_kept_is_an_error() -> None:
    graph = grpo(steps=1, refill=2, minibatches=2)
    text = failure(graph, lambda group: True)
    assert "has dropped every group of 16 samples in 2 rounds" in text and "refill.most (it is 2)" in text
    text = failure(grpo(steps=1, refill=2, samples=1), lambda group: group != 0)
    assert "has kept 1 of 7 samples in 2 rounds, too few for 2 minibatches" in text


def test_two_samples_of_one_group_are_one_for_a_loss_that_looks_at_it_whole() -> None:
    """And two for another loss (the control), which may divide the group over minibatches."""
    graph = grpo(steps=1, refill=2, samples=2, minibatches=2)
    calls = [
        replace(call, decl=replace(call.decl, scope="group")) if call.op == "train" else call
        for call in graph.calls
    ]
    text = failure(replace(graph, calls=tuple(calls)), lambda group: group != 0)
    assert "has kept 2 of 14 samples in 2 rounds, too few for 2 minibatches" in text
    workers, _ = simulate(place(graph, 1, {}), 1, drops=lambda group: group != 0)
    assert any(isinstance(m, Execute) and m.call == "train" for m in workers.taken)


def failure(graph: Graph, drops: Callable[[int], bool]) -> str:
    core, plan = Core(place(graph, 1, {})), place(graph, 1, {})
    workers = Workers(plan, 0)
    workers.drops = drops
    event: Event = Ready(0, 0.0)
    while True:
        out: list[Instruction] = core.handle(event, 0.0)
        for told in out:
            if isinstance(told, Abort):
                return told.text
            assert isinstance(told, To)
            workers.take(told)
        event = workers.events()[0]
        workers.happened(event)


def test_a_resumed_run_draws_from_where_the_checkpoint_stands() -> None:
    graph = grpo(steps=4, refill=2)
    core = Core(place(graph, 1, {}), start_step=2, carried=Carried(11))
    workers = Workers(core.plan, 0)
    for told in core.handle(Ready(0, 0.0), 0.0):
        assert isinstance(told, To)
        workers.take(told)
    assert workers.feeds[0, "rollout@2"][0] == 11


def test_judges_are_all_that_the_decision_hangs_on() -> None:
    assert judged(grpo(refill=2)) == {"rollout", "reward"}
    assert judged(grpo(refill=2, graded="ref")) == {"rollout", "reward", "judge"}


def test_without_refill_a_step_is_closed_at_once() -> None:
    """The control: the same step, with and without."""
    plain = StepReadiness(completed(place(grpo(), 1, {})).graph, 2)
    assert plain.closed and plain.groups == [8, 9, 10, 11] and plain.round == 0
    step = StepReadiness(completed(place(grpo(refill=2), 1, {})).graph, 2, 20)
    assert not step.closed and step.groups == [20, 21, 22, 23]
    names: list[Call] = [call for call in step.calls.values() if step.has_ready(call.name)]
    assert [call.name for call in names] == ["rollout"]
