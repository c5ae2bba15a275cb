"""The dispatches of a worker's function thread: calls without a model, and records of samples."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from realflow.engines.functions import FunctionError, Outcome, Progress, load_callable, run_call
from realflow.graph.datasection import SOURCE_FIELD
from realflow.graph.evaluate import SCORE
from realflow.graph.refill import REFILL
from realflow.graph.types import Call
from realflow.planfile import Plan
from realflow.runtime.fields import DataFields, Examination, Inputs, folder_of, scene
from realflow.runtime.link import MasterLink
from realflow.runtime.messages import DispatchDone, Execute, Failed
from realflow.runtime.readiness import main_rollout
from realflow.runtime.record import MASK, RECORD
from realflow.runtime.stats import Spans, eval_means, field_stats
from realflow.runtime.store import FieldStore

GRACE_SECONDS = 3.0
"""How long after its time limit a function may live before the process is ended by force."""


def returning(call: Call) -> Call:
    """The call as its function is run: what decides or judges has its field, which no other call reads."""
    if call.name not in (REFILL, SCORE):
        return call
    return replace(call, writes={use.name: use.name for use in call.decl.writes})


@dataclass(frozen=True)
class _Running:
    """The function under way, for the watchdog."""

    dispatch: str
    call: Call
    ids: Sequence[int]
    started: float


class FunctionTasks:
    """What the function thread does: each message is executed and reported done."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        store: FieldStore,
        inputs: Inputs,
        data: DataFields,
        link: MasterLink,
        examination: Examination | None = None,
    ) -> None:
        self._graph, self._rank, self._store, self._inputs = plan.graph, rank, store, inputs
        self._data, self._link, self._examination = data, link, examination
        self._functions: dict[str, Callable[..., Any]] = {}
        self._progress = Progress()
        self._running: _Running | None = None
        rollout = main_rollout(plan.graph)
        self._prompt = rollout.reads.get("prompt", "prompt") if rollout else "prompt"

    def execute(self, message: Execute) -> None:
        """Run a function on samples and store what it writes."""
        self._inputs.wait(message)
        call, ids = self._graph.call(message.call), message.shards[0]
        spans = Spans()
        if call.name == RECORD:
            self._link.send(DispatchDone(message.dispatch, self._rank, rows=self._rows(call, ids, message)))
            return
        outcome, values = self._run(call, ids, message, spans)
        if call.name == REFILL:
            dropped = self._dropped(call, ids, outcome)
            done = DispatchDone(message.dispatch, self._rank, spans=spans.merged, dropped=dropped)
            self._link.send(done)
            return
        if call.name == SCORE:
            self._link.send(self._judged(call, ids, outcome, message.dispatch, spans))
            return
        for name, column in outcome.fields.items():
            self._store.put(name, dict(zip(ids, column, strict=True)))
        mask = call.reads.get("loss_mask")
        stats = field_stats(call.name, outcome.fields, values[mask] if mask else None)
        # Each piece counts by its samples, so that how a step was cut into pieces changes no mean.
        means = {name: [value * len(ids), float(len(ids))] for name, value in outcome.metrics.items()}
        self._link.send(
            DispatchDone(
                message.dispatch,
                self._rank,
                stats=stats,
                spans=spans.merged,
                means=means,
                state=outcome.state,
            )
        )

    def _run(
        self, call: Call, ids: Sequence[int], message: Execute, spans: Spans
    ) -> tuple[Outcome, dict[str, list[Any]]]:
        """Run the function of a call; returns what it came to, and what it read."""
        graph, _ = scene(call, self._graph, self._data, self._examination)
        if call.name not in self._functions:
            self._functions[call.name] = load_callable(call.decl.name, base=folder_of(self._graph))
        values = self._inputs.values(call, ids)
        with spans:
            self._running = _Running(message.dispatch, call, ids, time.monotonic())
            # A function that never lets go of the interpreter (a backtracking regex) stops the watchdog
            # too; this timer is not Python: it prints where everything stands and ends the process.
            faulthandler.dump_traceback_later(call.timeout + GRACE_SECONDS, exit=True)
            try:
                outcome = run_call(
                    self._functions[call.name],
                    returning(call),
                    ids,
                    values,
                    message.lengths or self._lengths(call, ids, values),
                    graph.extents,
                    graph.dtypes,
                    progress=self._progress,
                    state=message.state,
                )
            finally:
                faulthandler.cancel_dump_traceback_later()
                self._running = None
        return outcome, values

    def _judged(
        self, call: Call, ids: Sequence[int], outcome: Outcome, dispatch: str, spans: Spans
    ) -> DispatchDone:
        """The report of an evaluation's rewards."""
        graph, data = scene(call, self._graph, self._data, self._examination)
        (rewards,) = outcome.fields.values()
        rows = (data.row(sample // graph.samples) for sample in ids)
        sources = [str(row[SOURCE_FIELD]) if SOURCE_FIELD in row else None for row in rows]
        means = {name: [value * len(ids), float(len(ids))] for name, value in outcome.metrics.items()}
        means |= eval_means(rewards, sources)
        return DispatchDone(dispatch, self._rank, spans=spans.merged, means=means)

    def _dropped(self, call: Call, ids: Sequence[int], outcome: Outcome) -> list[int]:
        """The groups of which a decision has chosen no sample."""
        (chosen,) = outcome.fields.values()
        kept = {sample // self._graph.samples for sample, stays in zip(ids, chosen, strict=True) if stays}
        return sorted({sample // self._graph.samples for sample in ids} - kept)

    def _lengths(self, call: Call, ids: Sequence[int], values: Mapping[str, Sequence[Any]]) -> list[int]:
        """Tokens of each sample where the master does not know them: they come from the data, or
        there are none."""
        for field in call.reads.values():
            if self._graph.extents.get(field) == "token":
                return [len(value) for value in values[field]]
        return [0] * len(ids)

    def overdue(self) -> Failed | None:
        """A failure, if the running function has used up its time (asked by the link's thread)."""
        running = self._running
        if running is None or time.monotonic() - running.started <= running.call.timeout:
            return None
        call, sample = running.call, self._progress.sample
        message = f"ran longer than its {call.timeout:g} s"
        if sample is None:  # it has whole columns, and was not seen to take one entry after the other
            shown = ", ".join(map(str, running.ids[:4])) + (", ..." if len(running.ids) > 4 else "")
            message = f"samples {shown}: {message}"
        return Failed(
            self._rank, running.dispatch, str(FunctionError(call.name, call.decl.name, message, sample)), ""
        )

    def _rows(self, call: Call, ids: Sequence[int], message: Execute) -> list[dict[str, Any]]:
        """A record for each sample: the data's columns and what calls wrote."""
        values = self._inputs.values(call, ids)
        rows = []
        for index, sample in enumerate(ids):
            group = sample // self._graph.samples
            row: dict[str, Any] = {"step": message.step, "sample_id": sample, "group_id": group}
            columns = self._data.row(group).items()
            row |= {self._shown(name): v for name, v in columns if isinstance(v, str | int | float | list)}
            row |= {name: values[field][index] for name, field in call.reads.items() if name != MASK}
            mask = values[call.reads[MASK]][index]
            row["length"] = int(mask.sum())
            row["prompt_length"] = len(mask) - row["length"]
            rows.append(row)
        return rows

    def _shown(self, column: str) -> str:
        """The name of a column of the data in records: readers find the prompt under its own."""
        return "prompt" if column == self._prompt else column
