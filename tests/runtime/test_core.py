"""The master's core against simulated workers, in any order of legal events."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import grpo, place

from realflow.graph.refill import REFILL
from realflow.graph.types import Follow, Sampling
from realflow.planfile import Plan
from realflow.planfile.holdings import Edge, Held, follow_edges, held_by, holdings, planned_edges, put_away
from realflow.runtime.added import completed
from realflow.runtime.core import Core
from realflow.runtime.dispatches import Dispatches, replicas
from realflow.runtime.events import Abort, Event, Finished, Prepare, Saved, StepDone, Tick, To, WorkerLost
from realflow.runtime.messages import (
    DispatchDone,
    Drain,
    Execute,
    Failed,
    Feed,
    Free,
    Halt,
    Open,
    Ready,
    Reallocate,
    SampleReady,
    Save,
)
from realflow.runtime.readiness import main_rollout, token_sources
from realflow.runtime.record import MASK, RECORD, with_record


class Workers:
    """Workers as the core sees them: ordered queues that keep the promises of real ones.

    `collective` dispatches end on a rank only when that rank has come to them in its own order, as
    a rank does that executes its queue one by one.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan = completed(plan)
        self.drops: Callable[[int], bool] = lambda group: False
        """Whether a group is to leave the step."""
        self.random = random.Random(seed)
        self.ordered: dict[int, deque[object]] = defaultdict(deque)
        self.functions: dict[int, deque[Execute]] = defaultdict(deque)
        self.feeds: dict[tuple[int, str], deque[int]] = defaultdict(deque)
        self.drained: set[tuple[int, str]] = set()
        self.store: dict[int, set[tuple[str, int]]] = defaultdict(set)
        self.orders: dict[int, list[int]] = defaultdict(list)
        self.versions: list[tuple[str, int, int]] = []
        self.weights: dict[Held, int | None] = defaultdict(int)
        """Holding of the actor -> version of its weights, None where they were freed."""
        self.saved: list[tuple[int, int | None]] = []
        """(step, version) of the actor's weights, as ranks saved them."""
        self.edges: dict[str, Edge] = {}
        self.away = put_away(plan.graph, plan.calls, "actor")
        self.log: list[object] = []
        self.freed: set[tuple[str, int]] = set()
        self.dispatched: list[str] = []
        self.sent_after: dict[str, int] = {}
        """Dispatch -> how many others had ended when it was sent."""
        self.taken: list[object] = []
        self.sources = token_sources(self.plan.graph)
        self.rollouts = [call.name for call in self.plan.graph.calls if call.op == "generate"]

    def length(self, rollout: str | None, sample: int) -> int:
        """Tokens of a sample, which differ between rollouts."""
        return 5 + sample % 7 + 20 * self.rollouts.index(str(rollout))

    def take(self, to: To) -> None:
        message, rank = to.message, to.rank
        self.taken.append(message)
        if isinstance(message, Execute):
            self._check_inputs(rank, message)
            self.sent_after.setdefault(message.dispatch, len(self.dispatched))
            call = self.plan.graph.call(message.call)
            (self.functions if call.op == "function" else self.ordered)[rank].append(message)
        elif isinstance(message, Open | Reallocate | Save):
            self.ordered[rank].append(message)
        elif isinstance(message, Feed):
            self.feeds[rank, message.dispatch].extend(message.groups)
        elif isinstance(message, Drain):
            self.drained.add((rank, message.dispatch))
        elif isinstance(message, Free):
            for name in message.fields:
                gone = {(name, s) for s in range(message.start, message.stop)}
                self.store[rank] -= gone
                self.freed |= gone
        if hasattr(message, "order"):
            self.orders[rank].append(message.order)

    def _check_inputs(self, rank: int, message: Execute) -> None:
        ordered = [s for shard in message.shards for s in shard]
        wanted, source = set(ordered), self.sources[message.call]
        assert message.lengths == [self.length(source, s) for s in ordered]
        by_field: dict[str, set[int]] = defaultdict(set)
        for name, owner, ids in message.inputs:
            assert {(name, s) for s in ids} <= self.store[owner], (
                "an owner does not hold what it is asked for"
            )
            by_field[name] |= set(ids)
            self.store[rank] |= {(name, s) for s in ids}
        for ids in by_field.values():
            assert message.whole or ids == wanted

    def events(self) -> list[Event]:
        """Everything that could happen next."""
        possible: list[Event] = []
        for rank, queue in self.functions.items():
            if queue:
                state, dropped = self._state_after(queue[0]), self._dropped(queue[0])
                possible.append(DispatchDone(queue[0].dispatch, rank, state=state, dropped=dropped))
        for rank, queue in self.ordered.items():
            if not queue:
                continue
            head = queue[0]
            if isinstance(head, Open):
                key = (rank, head.dispatch)
                if rank not in replicas(self.plan.calls[head.call]):  # it follows the rank that speaks
                    if key in self.drained:
                        possible.append(DispatchDone(head.dispatch, rank))
                elif self.feeds[key]:
                    n = self.plan.graph.call(head.call).samples
                    group = self.feeds[key][0]
                    ids = list(range(group * n, group * n + n))
                    lengths = [self.length(head.call, s) for s in ids]
                    possible.append(SampleReady(head.dispatch, rank, ids, lengths))
                elif key in self.drained:
                    possible.append(DispatchDone(head.dispatch, rank))
            elif self._others_there(head):
                possible.append(DispatchDone(head.dispatch, rank))
        return possible

    def _state_after(self, message: Execute) -> dict[str, object]:
        """What a function keeps: in which steps it has run."""
        if not self.plan.graph.call(message.call).decl.state:
            assert message.state == {}
            return {}
        return {"steps": [*message.state["steps"], message.step]}

    def _dropped(self, message: Execute) -> list[int]:
        if message.call != REFILL:
            return []
        groups = {sample // self.plan.graph.samples for sample in message.shards[0]}
        return sorted(group for group in groups if self.drops(group))

    def _others_there(self, head: object) -> bool:
        """A collective can end only once every rank that has it queued has come to it."""
        name = head.dispatch  # type: ignore[attr-defined]
        holders = [q for q in self.ordered.values() if any(getattr(m, "dispatch", "") == name for m in q)]
        return all(getattr(q[0], "dispatch", "") == name for q in holders)

    def happened(self, event: Event) -> None:
        self.log.append(event)
        if isinstance(event, SampleReady):
            self.feeds[event.rank, event.dispatch].popleft()
            self._write(event.rank, event.dispatch, event.ids)
        elif isinstance(event, DispatchDone):
            call = event.dispatch.split("@")[0]
            functions = self.functions[event.rank]
            if functions and functions[0].dispatch == event.dispatch:
                message = functions.popleft()
                self._write(event.rank, event.dispatch, message.shards[0])
                return
            message = self.ordered[event.rank].popleft()
            if isinstance(message, Open):
                self._used(event.rank, message)
                assert self.versions[-1][2] == message.version
            if isinstance(message, Reallocate):
                self._moved(event.rank, message)
            if isinstance(message, Save) and message.model == "actor":
                held = (event.rank, holdings(self.plan.calls["train"])[event.rank])
                self.saved.append((int(message.dispatch.split("@")[1]), self.weights[held]))
            if isinstance(message, Execute):
                self.dispatched.append(event.dispatch)
                self._used(event.rank, message)
                if self.plan.graph.call(call).op == "train":
                    held = (event.rank, holdings(self.plan.calls[call])[event.rank])
                    self.weights[held] += self.plan.graph.call(call).minibatches
                elif event.rank in replicas(self.plan.calls[call]):
                    self._write(event.rank, event.dispatch, [s for shard in message.shards for s in shard])

    def _moved(self, rank: int, message: Reallocate) -> None:
        edge = self.edges[message.edge]
        for held in edge.destinations:
            if held[0] == rank and edge.into == "actor":
                self.weights[held] = message.version
        for held in edge.sources:
            assert held[0] != rank or self.weights[held] == message.version, "a source is stale"

    def _used(self, rank: int, message: Open | Execute) -> None:
        """A call has worked on its holding of the actor, which must have had the weights, and lets go of
        them where nobody keeps them."""
        call = message.call
        if self.plan.graph.call(call).model != "actor":
            return
        held = (rank, holdings(self.plan.calls[call])[rank])
        found = self.weights[held]
        assert found is not None, "the weights were freed"
        self.versions.append((call, message.step, found))
        if self.away[held] == "free":
            self.weights[held] = None

    def _write(self, rank: int, dispatch: str, ids: list[int]) -> None:
        for name in self.plan.graph.call(dispatch.split("@")[0]).writes.values():
            self.store[rank] |= {(name, s) for s in ids}


def simulate(
    plan: Plan,
    seed: int,
    limit: int = 20_000,
    history: list[object] | None = None,
    drops: Callable[[int], bool] = lambda group: False,
) -> tuple[Workers, list[object]]:
    """Run to the end; every instruction that is not for a worker is returned in order.

    `history` takes the events too, with what each led to after it. `drops` says which groups leave.
    """
    history = [] if history is None else history
    core, workers, told = Core(plan), Workers(plan, seed), []
    workers.drops = drops
    pending: list[Event] = [Ready(rank, 0.1) for rank in range(plan.world_size)]
    workers.random.shuffle(pending)
    now = 0.0
    for _ in range(limit):
        if pending:
            event = pending.pop()
        else:
            possible = workers.events()
            if not possible:
                break
            event = workers.random.choice(possible)
            workers.happened(event)
        now += 0.01
        history.append(event)
        for instruction in core.handle(event, now):
            history.append(instruction)
            if isinstance(instruction, To):
                workers.take(instruction)
            elif isinstance(instruction, Prepare):
                assert instruction.edge.key not in workers.edges, "prepared twice"
                workers.edges[instruction.edge.key] = instruction.edge
            else:
                told.append(instruction)
                assert not isinstance(instruction, Abort), instruction.text
        if any(isinstance(t, Finished) for t in told):
            break
    return workers, told


PLACES = [
    (1, {}, {}, {}),
    (2, {}, {}, {}),
    (4, {"rollout": (0, 1), "train": (2,), "ref": (3,)}, {}, {}),
    (3, {"rollout": (0, 1, 2), "train": (1, 2), "ref": (2,), "reward": (0,), "credit": (1,)}, {}, {}),
    (3, {"rollout": (2,), "train": (0, 1), "credit": (2,)}, {}, {}),
    (3, {"rollout": (0, 1), "train": (2,), "greedy": (1,), "grade": (0,)}, {}, {}),
    (4, {}, {"rollout": "d2t2", "greedy": "t4", "train": "d2p2", "ref": "p4"}, {}),
    (4, {}, {"rollout": "t4", "greedy": "t4", "train": "d2t2"}, {"rollout": "free", "greedy": "free"}),
    (4, {"train": (0, 1), "ref": (2, 3)}, {"rollout": "d2p2", "train": "t2"}, {"rollout": "free"}),
    (4, {"rollout": (0, 2)}, {"rollout": "p2", "greedy": "d4"}, {"greedy": "free", "train": "offload"}),
]


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


def test_reallocation_only_where_weights_lack() -> None:
    same, _ = simulate(place(grpo(), 2, {}), 3)
    assert not any(isinstance(message, Reallocate) for message in same.taken)
    plan = place(grpo(), 3, {"rollout": (0, 1), "train": (2,)})
    apart, _ = simulate(plan, 3)
    moves = [message for message in apart.taken if isinstance(message, Reallocate)]
    assert len(moves) == 3 * 2, "three ranks take part after each step but the last"
    assert {v for _, step, v in apart.versions if step == 2} == {4}


def test_only_holdings_that_lack_weights_get_them() -> None:
    plan = place(grpo(second=2, steps=4), 4, {"greedy": (1,), "rollout": (0, 1), "train": (2,), "ref": (3,)})
    workers, _ = simulate(plan, 5)
    moves = set()
    for message in filter(is_move, workers.taken):
        edge = workers.edges[message.edge]
        moves.add(
            (message.dispatch, *(tuple(r for r, _ in side) for side in (edge.sources, edge.destinations)))
        )
    assert moves == {
        # `greedy` runs in steps 1 and 3: there it comes first, and `rollout` has the weights on rank 1.
        ("realloc:actor:greedy@v2", (2,), (1,)),
        ("realloc:actor:rollout@v2", (1, 2), (0,)),
        ("realloc:actor:rollout@v4", (2,), (0, 1)),
        ("realloc:actor:greedy@v6", (2,), (1,)),
        ("realloc:actor:rollout@v6", (1, 2), (0,)),
    }
    most: dict[str, int] = defaultdict(int)
    for dispatch, _, destinations in moves:
        call = dispatch.partition("@")[0].rpartition(":")[2]
        most[call] = max(most[call], len(destinations))
    assert {realloc.destination: realloc.bytes for realloc in plan.reallocs} == most


@pytest.mark.parametrize(
    "where", [*PLACES[6:], (4, {}, {"rollout": "p2t2", "greedy": "d2t2", "train": "d4"}, {})]
)
def test_the_core_moves_what_the_plan_foresees(where: tuple) -> None:
    """Where every call runs in every step: the same edges, after each training one of each."""
    plan = place(grpo(second=1, steps=4), *where)
    workers, told = simulate(plan, 11)
    assert isinstance(told[-1], Finished)
    foreseen = planned_edges(plan.graph, plan.calls)
    assert {(r.model, r.destination) for r in plan.reallocs} == {(e.model, e.call) for e in foreseen}
    after_training = Counter(m.edge for m in workers.taken if is_move(m) and not m.dispatch.endswith("@v0"))
    expected = Counter({edge.key: 0 for edge in foreseen})
    for edge in foreseen:
        expected[edge.key] += 3 * len(edge.ranks)
    assert after_training == expected


def test_frozen_models_never_move() -> None:
    workers, _ = simulate(place(grpo(), 4, {}, {"ref": "t4", "rollout": "t2p2"}), 3)
    assert {workers.edges[m.edge].into for m in workers.taken if is_move(m)} == {"actor"}


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3]), (2, [1, 3])])
def test_a_model_follows_another_at_the_end_of_steps(every: int, due: list[int]) -> None:
    graph = grpo(steps=4)
    ref = replace(graph.models["ref"], follows=Follow("actor", 0.9, every))
    graph = replace(graph, models={**graph.models, "ref": ref}, checkpoint_every=2)
    plan = place(graph, 4, {"train": (0, 1), "ref": (2, 3)}, {"train": "p2", "ref": "t2"})
    workers, told = simulate(plan, 5)
    assert isinstance(told[-1], Finished)
    (edge,) = [e for e in workers.edges.values() if e.into == "ref"]
    assert (edge.model, edge.decay, edge.key) == ("actor", 0.9, follow_edges(graph, plan.calls)[0].key)
    assert set(edge.destinations) == held_by(plan.calls["ref"])
    assert set(edge.sources) == held_by(plan.calls["train"])
    names = [getattr(m, "dispatch", "") for m in workers.taken]
    followed = list(dict.fromkeys(name for name in names if name.startswith("realloc:ref")))
    assert followed == [f"realloc:ref:actor@{step}" for step in due]
    assert all(message.order > 0 for message in workers.taken if is_move(message))
    for step in due:  # after the step's own calls of both models, before the next step's and the checkpoint
        at = names.index(f"realloc:ref:actor@{step}")
        assert max(names.index(f"{call}@{step}") for call in ("train", "ref")) < at
        if step + 1 < 4:
            assert at < names.index(f"ref@{step + 1}")
        if step % 2:
            assert at < names.index(f"save:ref@{step}") and f"save:actor@{step}" in names


@pytest.mark.parametrize("seed", range(12))
def test_a_step_is_told_of_when_what_follows_at_its_end_has_followed(seed: int) -> None:
    """Its seconds end before, with its calls; the next step has begun, and its checkpoint comes after."""
    graph = grpo(steps=4)
    ref = replace(graph.models["ref"], follows=Follow("actor", 0.9))
    graph = replace(graph, models={**graph.models, "ref": ref}, checkpoint_every=2)
    plan = place(graph, 4, {"train": (0, 1), "ref": (2, 3)}, {"train": "p2", "ref": "t2"})
    history: list[object] = []
    simulate(plan, seed, history=history)
    steps = [told for told in history if isinstance(told, StepDone)]
    assert [told.step for told in steps] == [0, 1, 2, 3]
    assert all(early.started < early.ended <= late.started for early, late in pairwise(steps))
    for told in steps:
        followed = [
            at
            for at, event in enumerate(history)
            if isinstance(event, DispatchDone) and event.dispatch == f"realloc:ref:actor@{told.step}"
        ]
        assert len(followed) == 4 and max(followed) < history.index(told)
    saved = {told.step: at for at, told in enumerate(history) if isinstance(told, Saved)}
    assert sorted(saved) == [1, 3] and all(history.index(steps[step]) < at for step, at in saved.items())


def test_a_follower_with_several_holdings_on_a_rank_has_an_edge_for_each() -> None:
    graph = grpo(probe="ref")
    ref = replace(graph.models["ref"], follows=Follow("actor", 0.9))
    graph = replace(graph, models={**graph.models, "ref": ref})
    plan = place(graph, 2, {}, {"ref": "t2", "probe": "p2"})
    workers, told = simulate(plan, 5)
    assert isinstance(told[-1], Finished)
    names = [m.dispatch for m in workers.taken if is_move(m) and m.dispatch.startswith("realloc:ref")]
    assert names == [
        f"realloc:ref:actor{turn}@{step}" for step in (0, 1, 2) for turn in ("", ".1") for _ in "ab"
    ]
    edges = [edge for edge in workers.edges.values() if edge.into == "ref"]
    assert [set(edge.destinations) for edge in edges] == [held_by(plan.calls[c]) for c in ("ref", "probe")]


def is_move(message: object) -> bool:
    return isinstance(message, Reallocate)


@pytest.mark.parametrize(("start", "trained"), [(0, 0), (1, 0), (2, 1), (5, 2)])
def test_a_resumed_run_counts_the_trainings_that_were_due(start: int, trained: int) -> None:
    core = Core(place(grpo(steps=8, train_every=2, minibatches=2), 1, {}), start_step=start)
    assert core.versions == {"actor": 2 * trained}


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


def started(plan: Plan) -> Core:
    core = Core(plan)
    for rank in range(plan.world_size):
        core.handle(Ready(rank, 0.0), 0.0)
    return core


def abort_text(instructions: list) -> str:
    assert all(isinstance(i.message, Halt) and i.message.failed for i in instructions if isinstance(i, To))
    return next(i.text for i in instructions if isinstance(i, Abort))


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
