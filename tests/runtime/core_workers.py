"""Workers as the master's core sees them, and a run of the core with them."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable

from realflow.graph.refill import REFILL
from realflow.planfile import Plan
from realflow.planfile.holdings import Edge, Held, holdings, put_away
from realflow.runtime.added import completed
from realflow.runtime.core import Core
from realflow.runtime.dispatches import replicas
from realflow.runtime.events import Abort, Event, Finished, Prepare, To
from realflow.runtime.messages import (
    DispatchDone,
    Drain,
    Execute,
    Feed,
    Free,
    Halt,
    Open,
    Ready,
    Reallocate,
    SampleReady,
    Save,
)
from realflow.runtime.readiness import token_sources


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


def is_move(message: object) -> bool:
    return isinstance(message, Reallocate)


def started(plan: Plan) -> Core:
    core = Core(plan)
    for rank in range(plan.world_size):
        core.handle(Ready(rank, 0.0), 0.0)
    return core


def abort_text(instructions: list) -> str:
    assert all(isinstance(i.message, Halt) and i.message.failed for i in instructions if isinstance(i, To))
    return next(i.text for i in instructions if isinstance(i, Abort))
