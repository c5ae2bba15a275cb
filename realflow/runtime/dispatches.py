"""The dispatches under way: who still works on them, until when, and what to tell of them. Pure."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from realflow.planfile import CallPlan, Plan
from realflow.runtime.messages import Failed
from realflow.runtime.readiness import StepReadiness
from realflow.runtime.weights import Weights


@dataclass
class Dispatch:
    """A dispatch under way. `limit` is in seconds after the last sign of progress.

    `line` is the thread of a worker that carries it out. `behind` counts the ranks on which earlier
    dispatches of that line are not done: until there are none it has no deadline, and theirs count.
    """

    name: str
    step: int
    call: str
    pending: set[int]
    ids: Mapping[int, list[int]]
    limit: float
    line: str
    behind: int = 0
    deadline: float = math.inf
    files: dict[str, str] = field(default_factory=dict)


class Dispatches:
    """Every dispatch that has not ended, by name, oldest first."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._calls = {call.name: call for call in plan.graph.calls}
        self._open: dict[str, Dispatch] = {}
        self._lines: dict[tuple[str, int], deque[Dispatch]] = defaultdict(deque)
        """(line, rank) -> what the rank has not finished, in its order."""
        self.not_ready = set(range(plan.world_size))
        """Ranks that still start."""

    def __bool__(self) -> bool:
        return bool(self._open)

    def __getitem__(self, name: str) -> Dispatch:
        return self._open[name]

    def start(self, name: str, step: int, call: str, ids: Mapping[int, list[int]], now: float) -> None:
        """A dispatch is sent to the ranks of `ids`, each with the samples that it will report."""
        where = self._plan.calls.get(call)
        predicted = where.predicted_seconds if where else None
        limit = max(self._plan.deadline_floor_seconds, self._plan.deadline_factor * (predicted or 0.0))
        line = "model"
        if call in self._calls and self._calls[call].op == "function":
            line = "function"
            limit = max(limit, 2 * self._calls[call].timeout)  # its watchdog, which can say more, is first
        assert name not in self._open, name
        found = self._open[name] = Dispatch(name, step, call, set(ids), ids, limit, line)
        for rank in ids:
            waiting = self._lines[line, rank]
            found.behind += bool(waiting)
            waiting.append(found)
        _begin(found, now)

    def reported(self, name: str, rank: int, now: float) -> Dispatch:
        """A rank has reported: its dispatch gets its full time again."""
        found = self._open.get(name)
        assert found is not None and rank in found.pending, (
            f"rank {rank} reports {name}, which it does not run"
        )
        _begin(found, now)
        return found

    def done(self, dispatch: Dispatch, rank: int, now: float) -> bool:
        """A rank has finished a dispatch; True when it was the last, and the dispatch is forgotten."""
        waiting = self._lines[dispatch.line, rank]
        assert waiting.popleft() is dispatch, f"rank {rank} did {dispatch.name} before its turn"
        if waiting:
            waiting[0].behind -= 1
            _begin(waiting[0], now)
        dispatch.pending.discard(rank)
        if dispatch.pending:
            return False
        del self._open[dispatch.name]
        return True

    def saving(self, step: int) -> bool:
        """Whether parts of the checkpoint of a step are still being written."""
        return any(d.step == step and d.call.startswith("save:") for d in self._open.values())

    def following(self, step: int) -> bool:
        """Whether a model still follows another one at the end of a step."""
        return any(d.step == step and d.call.startswith("realloc:") for d in self._open.values())

    def running(self, steps: Mapping[int, StepReadiness]) -> list[tuple[str, int, int, int]]:
        """(dispatch, step, samples done, samples in all) of what is under way, for progress lines."""
        shown = []
        for dispatch in self._open.values():
            step = steps.get(dispatch.step)
            if step is not None and dispatch.call in step.calls and not dispatch.call.startswith(":"):
                shown.append((dispatch.name, dispatch.step, len(step.owners[dispatch.call]), step.total))
        return shown

    def of_call(self, step: int, call: str) -> bool:
        """Whether a dispatch of a call in a step is under way."""
        return any(d.step == step and d.call == call for d in self._open.values())

    # ---- trouble ------------------------------------------------------------------------------

    def overdue(self, now: float) -> str | None:
        """What to say of a dispatch that is past its deadline."""
        for dispatch in self._open.values():
            if now > dispatch.deadline:
                ranks = ", ".join(str(rank) for rank in sorted(dispatch.pending))
                return (
                    f"{dispatch.name} is past its deadline of {dispatch.limit:.0f} s without progress; "
                    f"not finished on rank {ranks}"
                )
        return None

    def failure(self, event: Failed) -> str:
        """A rank's failure in words."""
        where = event.dispatch or self.doing(event.rank)
        detail = f"\n{event.detail.rstrip()}" if event.detail else ""
        return f"{where} failed on rank {event.rank}: {event.message}{detail}"

    def doing(self, rank: int) -> str:
        """What a rank has not finished, oldest first."""
        names = [self._described(d, rank) for d in self._open.values() if rank in d.pending]
        if names:
            return " and ".join(names)
        return "start-up" if rank in self.not_ready else "nothing (it was waiting for work)"

    def everyone(self) -> list[str]:
        """What each of the first ranks does, a line each."""
        return [f"  rank {rank}: {self.doing(rank)}" for rank in range(min(self._plan.world_size, 16))]

    def _described(self, dispatch: Dispatch, rank: int) -> str:
        """A dispatch by name; of a function also which, and on what samples: it may be what went wrong."""
        call = self._calls.get(dispatch.call)
        if call is None or call.op != "function":
            return dispatch.name
        ids = dispatch.ids[rank]
        shown = ", ".join(map(str, ids[:4])) + (", ..." if len(ids) > 4 else "")
        return f"{dispatch.name} ({call.decl.name} on samples {shown})"


def _begin(dispatch: Dispatch, now: float) -> None:
    """The clock of a dispatch starts (again) if all its ranks have come to it. A chain of those that wait
    for others always ends in one whose clock runs."""
    if not dispatch.behind:
        dispatch.deadline = now + dispatch.limit


def stuck(steps: Mapping[int, StepReadiness], weights: Weights) -> str:
    """What every call that has not finished waits for: an error of ours, not of the user's."""
    lines = ["no call is under way and none can start; this is an error in RealFlow or in the plan"]
    for index, step in sorted(steps.items()):
        for call in step.calls.values():
            if call.name in step.finished:
                continue
            lacking = [f"{count} samples of {name}" for name, count in step.lacking(call.name).items()]
            waits = ", ".join(lacking) or weights.waits(step, call)
            lines.append(f"  {call.name}@{index} waits for {waits}")
    return "\n".join(lines)


def replicas(where: CallPlan) -> tuple[int, ...]:
    """The rank that speaks for each data-parallel replica of a call (tensor rank 0 of the last stage)."""
    mesh = where.mesh
    return tuple(mesh.rank_at(pp=where.layout.pp - 1, dp=dp) for dp in range(where.layout.dp))


def replica_of(where: CallPlan, speaker: int) -> tuple[int, ...]:
    """All ranks of the replica that `speaker` belongs to."""
    dp = where.mesh.coordinate(speaker)["dp"]
    return tuple(rank for rank in where.ranks if where.mesh.coordinate(rank)["dp"] == dp)
