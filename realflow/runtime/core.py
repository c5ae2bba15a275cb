"""The master's core: a state machine without I/O. `handle(event, now) -> instructions`.

Events come in (`Ready`, `SampleReady`, `DispatchDone`, `Failed`, `WorkerLost`, `Tick`), instructions
go out: `To(rank, message)` for a worker, `Prepare`, `StepDone`, `Saved`, `Finished`, `Abort` for the
shell. The same events in the same order give the same instructions, so that a recorded run can be
replayed.

Rules, in the order in which they are applied:
- step k opens when fewer than 1 + max_staleness steps are open; steps end in order;
- a call of a trained model starts when at most max_staleness of the train dispatches that are due in
  earlier steps are not done;
- a call gets a unit (sample, group, batch) as soon as all its inputs are there; a train call also
  waits for every other call of its model in that step, and for the end of the steps before;
- before a call of a trained model runs, the new weights are moved into those of its holdings that
  lack them, from all that have them (`realflow.runtime.weights`);
- every ordered message carries a number that grows; each rank executes in that order;
- a field is freed when the last call that reads it has finished the step;
- a function that keeps something from step to step runs when it has run in the steps before;
- where groups are replaced, a round is decided when it is known of all its groups whether they stay, and
  the next step opens when the one before draws no more prompts: timing decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from realflow.graph.types import Call, Graph
from realflow.planfile import Plan
from realflow.planfile.holdings import Edge
from realflow.runtime.added import completed
from realflow.runtime.assign import Cost
from realflow.runtime.carried import Carried, State, at_start, state_for
from realflow.runtime.closing import Closing
from realflow.runtime.dispatches import Dispatch, Dispatches, stuck
from realflow.runtime.events import (
    Abort,
    Event,
    Finished,
    Instruction,
    Prepare,
    StepDone,
    Tick,
    To,
    WorkerLost,
)
from realflow.runtime.examiner import Examiner
from realflow.runtime.feeding import Feeding
from realflow.runtime.messages import (
    DispatchDone,
    Failed,
    Halt,
    Open,
    Ready,
    Reallocate,
    SampleReady,
    Save,
)
from realflow.runtime.orders import Orders
from realflow.runtime.readiness import StepReadiness
from realflow.runtime.rounds import numbers, too_few
from realflow.runtime.weights import Weights, kept


class Core:
    """The state of a run. One event at a time; `now` is in seconds of any steady clock."""

    def __init__(
        self,
        plan: Plan,
        *,
        start_step: int = 0,
        costs: Mapping[str, Cost] | None = None,
        carried: Carried | None = None,
    ) -> None:
        """`costs`: model -> estimated time of a sequence; tokens alone where it is not given. `carried` is
        what the steps before `start_step` have left."""
        self.plan = completed(plan)
        self.graph: Graph = self.plan.graph
        self._carried = carried or at_start(self.graph, start_step)
        self.weights = Weights(self.plan, start_step)
        self._orders = Orders(self.graph, self.plan.calls, costs or {})
        self._examiner = Examiner(self.plan, costs or {})
        self._dispatches = Dispatches(self.plan)
        self._feeding = Feeding(self.plan.calls)
        self._closing = Closing()
        self._next_step, self._next_prompt = start_step, self._carried.next_prompt
        self._steps: dict[int, StepReadiness] = {}
        self._begun: dict[int, float] = {}
        self._busy: dict[str, set[int]] = {call.name: set() for call in self.graph.calls}
        self._prepared: set[str] = set()
        """Keys of the edges that the shell was asked to prepare."""
        self._order = 0
        self._over = False
        self._out: list[Instruction] = []

    # ---- events -------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event; return what is to be done, in order."""
        self._out = []
        if self._over:
            return self._out
        match event:
            case SampleReady():
                self._sample_ready(event, now)
            case DispatchDone():
                self._dispatch_done(event, now)
            case Ready(rank=rank):
                self._dispatches.not_ready.discard(rank)
                self._advance(now)
            case Failed(refused=True, message=message):
                self._fail(message, refused=True)
            case Failed():
                self._fail(self._dispatches.failure(event))
            case WorkerLost(rank=rank, reason=reason):
                self._fail(f"rank {rank} {reason} during {self._dispatches.doing(rank)}")
            case Tick():
                overdue = self._dispatches.overdue(now)
                if overdue is not None:
                    self._fail(overdue)
        return self._out

    def _sample_ready(self, event: SampleReady, now: float) -> None:
        dispatch = self._dispatches.reported(event.dispatch, event.rank, now)
        step = self._step_of(dispatch)
        assert step is not None
        step.lengths[dispatch.call].update(zip(event.ids, event.lengths, strict=True))
        step.produced(dispatch.call, event.rank, event.ids)
        self._out += self._feeding.ready(dispatch.name, dispatch.call, event.rank, len(event.ids))
        self._advance(now)

    def _dispatch_done(self, event: DispatchDone, now: float) -> None:
        dispatch = self._dispatches.reported(event.dispatch, event.rank, now)
        dispatch.files.update(event.files)
        self._busy.get(dispatch.call, set()).discard(event.rank)
        step = self._step_of(dispatch)
        if step is not None and dispatch.call in step.calls and dispatch.name not in self._feeding:
            if step.calls[dispatch.call].decl.state:
                step.states[dispatch.call] = event.state
            step.dropped.update(event.dropped)
            step.produced(dispatch.call, event.rank, dispatch.ids.get(event.rank, ()))
        if self._dispatches.done(dispatch, event.rank, now):
            self._feeding.close(dispatch.name)
            self._dispatch_over(dispatch)
            self._tell()
        if step is not None and step.decided:
            self._settle(step)
        self._advance(now)

    def _dispatch_over(self, dispatch: Dispatch) -> None:
        if dispatch.call.startswith("save:"):
            self._closing.wrote(dispatch.step, dispatch.files)
            return
        step = self._step_of(dispatch)
        if step is None or dispatch.call not in step.calls:
            return
        call = step.calls[dispatch.call]
        if not step.all_done(call.name):
            assert call.op == "function" or step.refill, f"{dispatch.name} ended without all of its samples"
        self._finish(step, call)

    def _step_of(self, dispatch: Dispatch) -> StepReadiness | None:
        """The step that a dispatch belongs to, or the evaluation at its end."""
        if self._examiner.has(dispatch.call):
            return self._examiner.under_way
        return self._steps.get(dispatch.step)

    def _orders_of(self, step: StepReadiness) -> Orders:
        return self._examiner.orders(step, self._orders)

    def _finish(self, step: StepReadiness, call: Call) -> None:
        """A call has finished a step when all samples are reported, and nothing of it is under way."""
        under_way = self._dispatches.of_call(step.step, call.name)
        if call.name in step.finished or under_way or not step.all_done(call.name):
            return
        step.finished.add(call.name)
        if call.op == "train":
            self.weights.trained(call)
        self._free(step, call)

    def _settle(self, step: StepReadiness) -> None:
        """A round is decided: groups leave the step, and others are drawn, or the step has its groups."""
        assert step.refill is not None
        for ranks, message in self._orders.dropped(step, step.settle()):
            self._out.extend(To(rank, message) for rank in ranks)
        lacking = self.graph.prompts - len(step.groups)
        if lacking and step.round + 1 < step.refill.most:
            step.draw(lacking)
            self._next_prompt = step.next_prompt
        elif problem := too_few(step):
            self._fail(problem)
        else:
            step.close()
            for call in step.calls.values():
                self._finish(step, call)

    # ---- scheduling ---------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Start everything that can start."""
        if self._dispatches.not_ready or self._over:
            return
        for index in sorted(self._steps):
            if len(self._steps[index].finished) < len(self._steps[index].calls):
                break  # steps end in order
            self._end_step(index, now)
        self._examine(now)
        while self._open_step(now):
            pass
        # Training comes last, so that other calls of a later step need not wait for it, and trains once
        # the steps before have ended, whose followers and checkpoints have the weights of those steps.
        for trains in (False, True):
            for index in sorted(self._steps)[: 1 if trains else None]:
                step = self._steps[index]
                for call in step.calls.values():
                    if call.name not in step.finished and (call.op == "train") == trains:
                        self._try_call(step, call, now)
        if self._dispatches:
            return
        examined = self._examiner.under_way
        if self._steps or examined or self._next_step < self.graph.steps:
            steps = {**self._steps, examined.step: examined} if examined else self._steps
            self._fail(stuck(steps, self.weights))
            return
        self._over = True
        self._out.extend(To(rank, Halt(False, "done")) for rank in range(self.plan.world_size))
        self._out.append(Finished())

    def _open_step(self, now: float) -> bool:
        index = self._next_step
        if index >= self.graph.steps or len(self._steps) > self.graph.max_staleness:
            return False
        if self._examiner.under_way or not all(step.closed for step in self._steps.values()):
            return False
        step = self._steps[index] = StepReadiness(self.graph, index, self._next_prompt)
        self._begun[index] = now
        self._next_step, self._next_prompt = index + 1, step.next_prompt
        return True

    def _end_step(self, index: int, now: float) -> None:
        step = self._steps.pop(index)
        self._carried = Carried(step.next_prompt, {**self._carried.states, **step.states})
        for edge in self.weights.following(index):
            self._follow(edge, index, now)
        self._closing.ended(StepDone(index, self._begun.pop(index), now, numbers(step)))
        if self._examiner.due(index):
            self._examiner.begin(index, now)
        else:
            self._close(index, now)

    def _examine(self, now: float) -> None:
        """Go on with the evaluation at the end of a step; when it has ended, the step has."""
        step = self._examiner.under_way
        if step is None:
            return
        for call in step.calls.values():
            if call.name not in step.finished:
                self._try_call(step, call, now)
        if len(step.finished) == len(step.calls):
            self._closing.add(step.step, self._examiner.end(now))
            self._close(step.step, now, evaluated=True)

    def _close(self, index: int, now: float, evaluated: bool = False) -> None:
        """Tell of a step, unless something still follows at its end; order its checkpoint if it has one."""
        self._tell()
        every = self.graph.checkpoint_every
        due = index + 1 == self.graph.steps or (every is not None and (index + 1) % every == 0)
        if due or (evaluated and self._examiner.keeps_best):
            self._save(index, now)

    def _tell(self) -> None:
        self._out += self._closing.told(self._dispatches, self._examiner.step)

    def _save(self, index: int, now: float) -> None:
        self._closing.saves(index, self._carried)
        for model, call in kept(self.graph).items():
            ranks = self.plan.calls[call.name].ranks
            name = f"save:{model}@{index}"
            self._start(name, index, f"save:{model}", {rank: [] for rank in ranks}, now)
            for rank in ranks:
                message = Save(self._order, name, model, index + 1, f"step-{index + 1:06d}")
                self._out.append(To(rank, message))

    def _try_call(self, step: StepReadiness, call: Call, now: float) -> None:
        if call.op == "function":
            self._try_function(step, call, now)
        elif step.has_ready(call.name) and self.weights.allow(step, call):
            ids = [sample for unit in step.take(call.name) for sample in unit]
            like = self._examiner.like(call)
            edge = self.weights.edge(like)
            if edge is not None:
                self._move(edge, step, now)
            self.weights.used(like)
            if call.op == "generate":
                self._open_stream(step, call, ids, now)
            else:
                held, messages = self._orders_of(step).spread(self._order + 1, step, call, ids)
                self._start(step.name(call.name), step.step, call.name, held, now)
                self._out.extend(To(rank, message) for rank, message in messages.items())

    def _move(self, edge: Edge, step: StepReadiness, now: float) -> None:
        """Order the reallocation of an edge before the call that needs it."""
        what = f"realloc:{edge.into}:{edge.call}"
        name = f"{what}@v{self.weights.version(edge.model)}"
        if self.graph.max_staleness:  # where several of one version may be under way
            name += f".{step.step}"
        if step.round:
            name += f".{step.round}"
        if step is self._examiner.under_way:
            name += ".eval"
        self._reallocate(edge, what, name, -1, now)
        self.weights.moved(edge)

    def _follow(self, edge: Edge, step: int, now: float) -> None:
        """Order the move into a model that follows another one at the end of a step, and belongs to it."""
        what = f"realloc:{edge.into}:{edge.model}" + (f".{edge.turn}" if edge.turn else "")
        self._reallocate(edge, what, f"{what}@{step}", step, now)

    def _reallocate(self, edge: Edge, what: str, name: str, step: int, now: float) -> None:
        """Send the orders; the first time the shell must prepare the edge's schedule."""
        if edge.key not in self._prepared:
            self._prepared.add(edge.key)
            self._out.append(Prepare(edge))
        self._start(name, step, what, {rank: [] for rank in edge.ranks}, now)
        version = self.weights.version(edge.model)
        for rank in edge.ranks:
            self._out.append(To(rank, Reallocate(self._order, name, edge.key, version)))

    def _open_stream(self, step: StepReadiness, call: Call, ids: list[int], now: float) -> None:
        where = self.plan.calls[call.name]
        name = step.name(call.name)
        self._start(name, step.step, call.name, {rank: [] for rank in where.ranks}, now)
        assert call.sampling is not None
        version, limit = self.weights.version(call.model), call.sampling.limit(step.step)
        for rank in where.ranks:
            self._out.append(To(rank, Open(self._order, name, call.name, step.step, version, limit)))
        self._out += self._feeding.open(name, call, ids)

    def _try_function(self, step: StepReadiness, call: Call, now: float) -> None:
        """Hand ready units to ranks, at most one piece at a time for each rank; the rest is kept."""
        state: State | None = {}
        if call.decl.state:
            earlier = [self._steps[index] for index in sorted(self._steps) if index < step.step]
            state = state_for(earlier, self._carried, call)
        if state is None:
            return
        self._orders_of(step).assign(step, call)
        backlog = step.backlog[call.name]
        for rank in [r for r in backlog if r not in self._busy[call.name]]:
            piece = step.pieces[call.name]
            step.pieces[call.name] += 1
            ids = sorted(backlog.pop(rank))
            name = f"{call.name}@{step.step}.{piece}"
            self._busy[call.name].add(rank)
            self._start(name, step.step, call.name, {rank: ids}, now)
            self._out.append(To(rank, self._orders_of(step).piece(self._order, name, step, call, ids, state)))

    def _start(self, name: str, step: int, call: str, ids: Mapping[int, list[int]], now: float) -> None:
        self._order += 1
        self._dispatches.start(name, step, call, ids, now)

    def _free(self, step: StepReadiness, call: Call) -> None:
        """Free the fields whose last reader has just finished."""
        for ranks, message in self._orders_of(step).freed(step, call):
            self._out.extend(To(rank, message) for rank in ranks)

    def _fail(self, text: str, refused: bool = False) -> None:
        self._over = True
        self._out = [To(rank, Halt(True, text.splitlines()[0])) for rank in range(self.plan.world_size)]
        told = text if refused else "\n".join([text, "At that moment:", *self._dispatches.everyone()])
        self._out.append(Abort(told, refused))

    @property
    def versions(self) -> Mapping[str, int]:
        """Model -> optimizer steps that its weights have seen."""
        return self.weights.versions

    def running(self) -> list[tuple[str, int, int, int]]:
        """(dispatch, step, samples done, samples in all) of what is under way, for progress lines."""
        return self._dispatches.running(self._steps)
