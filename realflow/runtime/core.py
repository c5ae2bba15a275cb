"""The master's core: a state machine without I/O. `handle(event, now) -> instructions`.

Events come in (`Ready`, `SampleReady`, `DispatchDone`, `Failed`, `WorkerLost`, `Tick`), instructions
go out: `To(rank, message)` for a worker, `StepDone`, `Saved`, `Finished`, `Abort` for the shell. The
same events in the same order give the same instructions, so that a recorded run can be replayed.

Rules, in the order in which they are applied:
- step k opens when fewer than 1 + max_staleness steps are open;
- a call of a trained model starts when at most max_staleness of the train dispatches that are due in
  earlier steps are not done;
- a call gets a unit (sample, group, batch) as soon as all its inputs are there; a train call also
  waits for every other call of its model in that step;
- before a call of a trained model runs, the new weights are copied to those of its ranks that lack
  them, from all that have them;
- every ordered message carries a number that grows; each rank executes in that order;
- a field is freed when the last call that reads it has finished the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from realflow.data.balance import minibatches
from realflow.graph.types import Call, Graph
from realflow.planfile import CallPlan, Plan
from realflow.runtime.assign import Cost, divide, near_owner
from realflow.runtime.events import (
    Abort,
    Event,
    Finished,
    Instruction,
    Saved,
    StepDone,
    Tick,
    To,
    WorkerLost,
)
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
from realflow.runtime.readiness import (
    StepReadiness,
    dispatches_before,
    last_readers,
    producers,
    token_sources,
)
from realflow.runtime.record import with_record


@dataclass
class _Dispatch:
    """A dispatch under way. `limit` is in seconds after the last sign of progress on its ranks."""

    name: str
    step: int
    call: str
    pending: set[int]
    ids: dict[int, list[int]]
    limit: float
    deadline: float
    files: dict[str, str] = field(default_factory=dict)


@dataclass
class _Stream:
    """A generate dispatch: prompts not yet fed, and how many samples each replica still owes."""

    waiting: list[int]
    outstanding: dict[int, int]
    drained: bool = False


def replicas(where: CallPlan) -> tuple[int, ...]:
    """The rank that speaks for each data-parallel replica of a call (tensor rank 0 of the last stage)."""
    mesh = where.mesh
    return tuple(mesh.rank_at(pp=where.layout.pp - 1, dp=dp) for dp in range(where.layout.dp))


class Core:
    """The state of a run. One event at a time; `now` is in seconds of any steady clock."""

    def __init__(self, plan: Plan, *, start_step: int = 0, costs: Mapping[str, Cost] | None = None) -> None:
        self.plan = with_record(plan)
        self.graph: Graph = self.plan.graph
        self.costs: Mapping[str, Cost] = costs or {}
        """Model -> estimated time of a sequence; tokens alone where it is not given."""
        self.versions = dict.fromkeys(self.graph.trained(), 0)
        """Model -> optimizer steps that its weights have seen."""
        self._trained = dict.fromkeys(self.graph.trained(), 0)
        """Model -> train dispatches that are done."""
        for model, call in self.graph.trained().items():
            self._trained[model] = dispatches_before(call, start_step)
            self.versions[model] = self._trained[model] * call.minibatches
        self._next_step = start_step
        self._steps: dict[int, StepReadiness] = {}
        self._begun: dict[int, float] = {}
        self._dispatches: dict[str, _Dispatch] = {}
        self._streams: dict[str, _Stream] = {}
        self._busy: dict[str, set[int]] = {call.name: set() for call in self.graph.calls}
        self._fresh: dict[str, set[int]] = {}
        """Trained model -> ranks that hold its newest weights; absent while no rank's have changed."""
        self._files: dict[int, dict[str, str]] = {}
        self._order = 0
        self._not_ready = set(range(self.plan.world_size))
        self._over = False
        self._readers = last_readers(self.graph)
        self._sources = token_sources(self.graph)
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
                self._not_ready.discard(rank)
                if not self._not_ready:
                    self._advance(now)
            case Failed(refused=True, message=message):
                self._fail(message, refused=True)
            case Failed():
                self._fail(self._failure_text(event))
            case WorkerLost(rank=rank, reason=reason):
                self._fail(f"rank {rank} {reason} during {self._doing(rank)}")
            case Tick():
                self._check_deadlines(now)
        return self._out

    def _sample_ready(self, event: SampleReady, now: float) -> None:
        dispatch = self._known(event.dispatch, event.rank)
        step = self._steps[dispatch.step]
        step.lengths[dispatch.call].update(zip(event.ids, event.lengths, strict=True))
        step.produced(dispatch.call, event.rank, event.ids)
        self._progress(event.rank, now)
        self._streams[dispatch.name].outstanding[event.rank] -= len(event.ids)
        self._feed(dispatch)
        self._advance(now)

    def _dispatch_done(self, event: DispatchDone, now: float) -> None:
        dispatch = self._known(event.dispatch, event.rank)
        dispatch.pending.discard(event.rank)
        self._progress(event.rank, now)
        dispatch.files.update(event.files)
        self._busy.get(dispatch.call, set()).discard(event.rank)
        step = self._steps.get(dispatch.step)
        if step is not None and dispatch.call in step.calls and dispatch.name not in self._streams:
            step.produced(dispatch.call, event.rank, dispatch.ids.get(event.rank, ()))
        if not dispatch.pending:
            del self._dispatches[dispatch.name]
            self._streams.pop(dispatch.name, None)
            self._dispatch_over(dispatch)
        self._advance(now)

    def _dispatch_over(self, dispatch: _Dispatch) -> None:
        if dispatch.call.startswith("save:"):
            files = self._files.setdefault(dispatch.step, {})
            files.update(dispatch.files)
            saves = (d for d in self._dispatches.values() if d.call.startswith("save:"))
            if not any(other.step == dispatch.step for other in saves):
                self._out.append(Saved(dispatch.step, self._files.pop(dispatch.step)))
            return
        step = self._steps.get(dispatch.step)
        if step is None or dispatch.call not in step.calls:
            return
        call = step.calls[dispatch.call]
        if not step.all_done(call.name):
            assert call.op == "function", f"{dispatch.name} ended without all of its samples"
            return
        step.finished.add(call.name)
        if call.op == "train":
            assert call.model is not None
            self._trained[call.model] += 1
            self.versions[call.model] += call.minibatches
            self._fresh[call.model] = set(self.plan.calls[call.name].ranks)
        self._free(step, call)

    # ---- scheduling ---------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Start everything that can start."""
        if self._not_ready:
            return
        while True:
            for index in sorted(self._steps):
                step = self._steps[index]
                for call in step.calls.values():
                    if call.name not in step.finished:
                        self._try_call(step, call, now)
            done = [i for i, step in sorted(self._steps.items()) if len(step.finished) == len(step.calls)]
            for index in done:
                self._end_step(index, now)
            if not self._open_step(now) and not done:
                break
        if self._dispatches:
            return
        if self._steps or self._next_step < self.graph.steps:
            self._fail(self._stuck_text())
            return
        self._over = True
        self._out.extend(To(rank, Halt(False, "done")) for rank in range(self.plan.world_size))
        self._out.append(Finished())

    def _open_step(self, now: float) -> bool:
        index = self._next_step
        if index >= self.graph.steps or len(self._steps) > self.graph.max_staleness:
            return False
        self._steps[index] = StepReadiness(self.graph, index)
        self._begun[index] = now
        self._next_step += 1
        return True

    def _end_step(self, index: int, now: float) -> None:
        del self._steps[index]
        self._out.append(StepDone(index, self._begun.pop(index)))
        every = self.graph.checkpoint_every
        last = index + 1 == self.graph.steps
        if last or (every is not None and (index + 1) % every == 0):
            self._save(index, now)

    def _save(self, index: int, now: float) -> None:
        for model, call in self.graph.trained().items():
            ranks = self.plan.calls[call.name].ranks
            name = f"save:{model}@{index}"
            self._start(name, index, f"save:{model}", {rank: [] for rank in ranks}, now)
            for rank in ranks:
                message = Save(self._order, name, model, index + 1, f"step-{index + 1:06d}")
                self._out.append(To(rank, message))

    def _try_call(self, step: StepReadiness, call: Call, now: float) -> None:
        if call.op == "function":
            self._try_function(step, call, now)
        elif step.has_ready(call.name) and self._weights_allow(step, call):
            units = step.take(call.name)
            self._refresh(call, now)
            if call.op == "generate":
                self._open_stream(step, call, [sample for unit in units for sample in unit], now)
            else:
                self._execute(step, call, [sample for unit in units for sample in unit], now)

    def _weights_allow(self, step: StepReadiness, call: Call) -> bool:
        if call.model not in self._trained:
            return True
        done, due = self._trained[call.model], self._due(step, call.model)
        if call.op == "train":  # the step's other calls of this model must see the old weights
            others = (c for c in step.calls.values() if c.model == call.model and c.name != call.name)
            return done == due and all(other.name in step.finished for other in others)
        return done >= due - self.graph.max_staleness

    def _due(self, step: StepReadiness, model: str) -> int:
        """Train dispatches of a model in the steps before `step`."""
        return dispatches_before(self.graph.trained()[model], step.step)

    def _refresh(self, call: Call, now: float) -> None:
        """Copy the model's weights to the ranks of `call` that hold older ones, if there are some."""
        fresh = self._fresh.get(str(call.model))
        if fresh is None or fresh.issuperset(self.plan.calls[call.name].ranks):
            return
        assert call.model is not None
        sources, lacking = sorted(fresh), sorted(set(self.plan.calls[call.name].ranks) - fresh)
        fresh.update(lacking)
        version = self.versions[call.model]
        what = f"realloc:{call.model}:{call.name}"
        name = f"{what}@v{version}"
        ranks = sorted({*sources, *lacking})
        self._start(name, -1, what, {rank: [] for rank in ranks}, now)
        for rank in ranks:
            message = Reallocate(self._order, name, call.model, sources, lacking, version)
            self._out.append(To(rank, message))

    def _open_stream(self, step: StepReadiness, call: Call, ids: list[int], now: float) -> None:
        where = self.plan.calls[call.name]
        name = f"{call.name}@{step.step}"
        speakers = replicas(where)
        self._start(name, step.step, call.name, {rank: [] for rank in where.ranks}, now)
        version = self.versions.get(str(call.model), 0)
        for rank in where.ranks:
            self._out.append(To(rank, Open(self._order, name, call.name, step.step, version)))
        groups = sorted({sample // self.graph.samples for sample in ids})
        self._streams[name] = _Stream(groups, dict.fromkeys(speakers, 0))
        self._feed(self._dispatches[name])

    def _feed(self, dispatch: _Dispatch) -> None:
        """Give waiting prompts to the replicas that owe the least; one group beyond full slots each."""
        stream = self._streams[dispatch.name]
        where = self.plan.calls[dispatch.call]
        given: dict[int, list[int]] = {}
        while stream.waiting:
            rank = min(stream.outstanding, key=lambda r: (stream.outstanding[r], r))
            if stream.outstanding[rank] >= where.slots + self.graph.samples:
                break
            given.setdefault(rank, []).append(stream.waiting.pop(0))
            stream.outstanding[rank] += self.graph.samples
        for rank, groups in given.items():
            for member in self._replica_ranks(where, rank):
                self._out.append(To(member, Feed(dispatch.name, groups)))
        if not stream.waiting and not stream.drained:
            stream.drained = True
            self._out.extend(To(rank, Drain(dispatch.name)) for rank in where.ranks)

    def _replica_ranks(self, where: CallPlan, speaker: int) -> tuple[int, ...]:
        dp = where.mesh.coordinate(speaker)["dp"]
        return tuple(rank for rank in where.ranks if where.mesh.coordinate(rank)["dp"] == dp)

    def _try_function(self, step: StepReadiness, call: Call, now: float) -> None:
        """Hand ready units to ranks, at most one piece at a time for each rank; the rest is kept."""
        where = self.plan.calls[call.name]
        backlog = step.backlog[call.name]
        if step.has_ready(call.name):
            load = {rank: len(ids) for rank, ids in backlog.items()}
            owners = [step.owners[p] for p in producers(self.graph, call) if p in step.calls]
            for unit in step.take(call.name):
                rank = near_owner(unit, owners, where.ranks, load)
                load[rank] = load.get(rank, 0) + len(unit)
                backlog.setdefault(rank, []).extend(unit)
        for rank in [r for r in backlog if r not in self._busy[call.name]]:
            piece = step.pieces[call.name]
            step.pieces[call.name] += 1
            ids = sorted(backlog.pop(rank))
            name = f"{call.name}@{step.step}.{piece}"
            self._busy[call.name].add(rank)
            self._start(name, step.step, call.name, {rank: ids}, now)
            inputs, lengths = self._inputs(step, call, ids), self._lengths(step, call, ids)
            self._out.append(
                To(rank, Execute(self._order, name, call.name, step.step, [ids], inputs, lengths))
            )

    def _execute(self, step: StepReadiness, call: Call, ids: list[int], now: float) -> None:
        """An infer or train dispatch over all ranks of its mesh.

        Where tokens come from the data, only workers know the lengths. Replicas then take their parts
        of a train minibatch themselves, by estimated time. Samples of an infer call are divided by
        their number: the core must know which rank will hold what it writes.
        """
        where = self.plan.calls[call.name]
        groups = [sample // self.graph.samples for sample in ids]
        batches = minibatches(ids, groups, call.minibatches)
        source = self._sources[call.name]
        whole = call.op == "train" and source is None
        if whole:
            parts = [[batch] * where.layout.dp for batch in batches]
        else:
            cost = self.costs.get(str(call.model), float)
            known = step.lengths[source] if source else {}
            parts = [divide(batch, known, where.layout.dp, cost) for batch in batches]
        shards = [[part[dp] for part in parts] for dp in range(where.layout.dp)]
        flat = [[sample for shard in mine for sample in shard] for mine in shards]
        held: dict[int, list[int]] = {rank: [] for rank in where.ranks}
        for dp, rank in enumerate(replicas(where)):
            held[rank] = ([] if dp else ids) if whole else flat[dp]
        name = f"{call.name}@{step.step}"
        self._start(name, step.step, call.name, held, now)
        for rank in where.ranks:
            dp = where.mesh.coordinate(rank)["dp"]
            inputs, lengths = self._inputs(step, call, flat[dp]), self._lengths(step, call, flat[dp])
            message = Execute(
                self._order, name, call.name, step.step, shards[dp], inputs, lengths=lengths, whole=whole
            )
            self._out.append(To(rank, message))

    def _lengths(self, step: StepReadiness, call: Call, ids: list[int]) -> list[int]:
        """Tokens of each sample as `call` sees it; nothing where only workers can know."""
        source = self._sources[call.name]
        return [step.lengths[source][sample] for sample in ids] if source else []

    def _inputs(self, step: StepReadiness, call: Call, ids: list[int]) -> list[list[object]]:
        """[field, owner, ids] for every field that other calls wrote for `ids`."""
        inputs: list[list[object]] = []
        for name in dict.fromkeys(call.reads.values()):
            writer = self.graph.writer(name)
            if writer is None or writer.name not in step.calls:
                continue
            owners = step.owners[writer.name]
            by_owner: dict[int, list[int]] = {}
            for sample in ids:
                by_owner.setdefault(owners[sample], []).append(sample)
            inputs.extend([name, owner, samples] for owner, samples in sorted(by_owner.items()))
        return inputs

    def _start(self, name: str, step: int, call: str, ids: dict[int, list[int]], now: float) -> None:
        self._order += 1
        where = self.plan.calls.get(call)
        predicted = where.predicted_seconds if where else None
        limit = max(self.plan.deadline_floor_seconds, self.plan.deadline_factor * (predicted or 0.0))
        known = next((c for c in self.graph.calls if c.name == call), None)
        if known is not None and known.op == "function":
            limit = max(limit, 2 * known.timeout)  # its own watchdog, which can say more, comes first
        assert name not in self._dispatches, name
        self._dispatches[name] = _Dispatch(name, step, call, set(ids), ids, limit, now + limit)

    def _progress(self, rank: int, now: float) -> None:
        """A rank has reported: what it still has to do, perhaps queued until now, gets its full time."""
        for dispatch in self._dispatches.values():
            if rank in dispatch.pending:
                dispatch.deadline = now + dispatch.limit

    def _free(self, step: StepReadiness, call: Call) -> None:
        """Free the fields whose last reader has just finished."""
        by_ranks: dict[tuple[int, ...], list[str]] = {}
        for name in {*call.reads.values(), *call.writes.values()}:
            writer = self.graph.writer(name)
            if writer is None or writer.name not in step.finished:
                continue
            readers = {reader for reader in self._readers[name] if reader in step.calls}
            if readers <= step.finished:
                users = {writer.name, *readers}
                ranks = tuple(sorted({rank for user in users for rank in self.plan.calls[user].ranks}))
                by_ranks.setdefault(ranks, []).append(name)
        for ranks, names in by_ranks.items():
            message = Free(sorted(names), step.first, step.stop)
            self._out.extend(To(rank, message) for rank in ranks)

    # ---- trouble ------------------------------------------------------------------------------

    def _known(self, name: str, rank: int) -> _Dispatch:
        dispatch = self._dispatches.get(name)
        assert dispatch is not None and rank in dispatch.pending, (
            f"rank {rank} reports {name}, which it does not run"
        )
        return dispatch

    def _check_deadlines(self, now: float) -> None:
        for dispatch in self._dispatches.values():
            if now > dispatch.deadline:
                ranks = ", ".join(str(rank) for rank in sorted(dispatch.pending))
                self._fail(
                    f"{dispatch.name} is past its deadline of {dispatch.limit:.0f} s without progress; "
                    f"not finished on rank {ranks}"
                )
                return

    def _stuck_text(self) -> str:
        """What every call that has not finished waits for: an error of ours, not of the user's."""
        lines = ["no call is under way and none can start; this is an error in RealFlow or in the plan"]
        for index, step in sorted(self._steps.items()):
            for call in step.calls.values():
                if call.name not in step.finished:
                    lines.append(f"  {call.name}@{index} waits for {self._waits(step, call)}")
        return "\n".join(lines)

    def _waits(self, step: StepReadiness, call: Call) -> str:
        lacking = [f"{count} samples of {name}" for name, count in step.lacking(call.name).items()]
        if lacking:
            return ", ".join(lacking)
        if call.model not in self._trained:
            return "nothing"
        done, due = self._trained[call.model], self._due(step, call.model)
        others = [c.name for c in step.calls.values() if c.model == call.model and c.name != call.name]
        last = [name for name in others if name not in step.finished] if call.op == "train" else []
        return ", ".join([f"weights of {call.model} ({done} of {due} train dispatches are done)", *last])

    def _failure_text(self, event: Failed) -> str:
        where = event.dispatch or self._doing(event.rank)
        detail = f"\n{event.detail.rstrip()}" if event.detail else ""
        return f"{where} failed on rank {event.rank}: {event.message}{detail}"

    def _doing(self, rank: int) -> str:
        """What a rank has not finished, oldest first."""
        names = [self._described(d, rank) for d in self._dispatches.values() if rank in d.pending]
        if names:
            return " and ".join(names)
        return "start-up" if rank in self._not_ready else "nothing (it was waiting for work)"

    def _described(self, dispatch: _Dispatch, rank: int) -> str:
        """A dispatch by name; of a function also which, and on what samples: it may be what went wrong."""
        call = next((c for c in self.graph.calls if c.name == dispatch.call), None)
        if call is None or call.op != "function":
            return dispatch.name
        ids = dispatch.ids[rank]
        shown = ", ".join(map(str, ids[:4])) + (", ..." if len(ids) > 4 else "")
        return f"{dispatch.name} ({call.decl.name} on samples {shown})"

    def _fail(self, text: str, refused: bool = False) -> None:
        others = [f"  rank {rank}: {self._doing(rank)}" for rank in range(min(self.plan.world_size, 16))]
        self._over = True
        self._out = [To(rank, Halt(True, text.splitlines()[0])) for rank in range(self.plan.world_size)]
        self._out.append(Abort(text if refused else "\n".join([text, "At that moment:", *others]), refused))

    def running(self) -> list[tuple[str, int, int, int]]:
        """(dispatch, step, samples done, samples in all) of what is under way, for progress lines."""
        shown = []
        for dispatch in self._dispatches.values():
            step = self._steps.get(dispatch.step)
            if step is not None and dispatch.call in step.calls and not dispatch.call.startswith(":"):
                shown.append(
                    (dispatch.name, dispatch.step, len(step.owners[dispatch.call]), step.stop - step.first)
                )
        return shown
