"""The dispatches of one worker: each method executes one message and reports it done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from realflow.data.balance import micro_batches
from realflow.data.batch import Batch, pack
from realflow.data.source import open_source
from realflow.data.text import encode_prompt
from realflow.engines.functions import FunctionError, Progress, load_callable, run_function
from realflow.engines.generate import Finished, Prompt
from realflow.engines.infer import infer_logprobs
from realflow.engines.state import file_digest, save_state
from realflow.graph.types import Call, Graph
from realflow.models.save import save_model
from realflow.planfile import Plan
from realflow.runtime.assign import divide
from realflow.runtime.core import RECORD
from realflow.runtime.directory import partial_directory
from realflow.runtime.fields import DataFields, Inputs, numeric_stats, pair_tokenizer
from realflow.runtime.hosts import Hosts
from realflow.runtime.link import MasterLink
from realflow.runtime.messages import (
    DispatchDone,
    Drain,
    Execute,
    Failed,
    Open,
    Reallocate,
    SampleReady,
    Save,
)
from realflow.runtime.store import FieldStore

METRIC_NAMES = {
    "rewards": "critic/rewards",
    "advantages": "critic/advantages",
    "returns": "critic/returns",
    "values": "critic/values",
}
"""Fields whose metrics have a name that users know (verl's)."""


def folder_of(graph: Graph) -> Path | None:
    """Where the graph's file lies: relative data paths and the user's functions start there."""
    return Path(graph.folder) if graph.folder else None


def make_data(plan: Plan, hosts: Hosts, run_dir: Path) -> DataFields:
    """The data section as this worker reads it."""
    spec = plan.graph.data
    tokenize = None
    if spec.tokenize is not None and spec.tokenize in hosts.hosts:
        tokenize = pair_tokenizer(hosts.hosts[spec.tokenize].tokenizer, True, spec.max_length)
    return DataFields(
        plan.graph, open_source(spec, seed=plan.graph.seed, base=folder_of(plan.graph)), tokenize
    )


class ModelTasks:
    """What the main thread does: everything that needs a model or a collective."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        hosts: Hosts,
        store: FieldStore,
        inputs: Inputs,
        data: DataFields,
        link: MasterLink,
        run_dir: Path,
    ) -> None:
        self._plan, self._graph, self._rank, self._hosts = plan, plan.graph, rank, hosts
        self._store, self._inputs, self._data, self._link = store, inputs, data, link
        self._run_dir = run_dir
        self._losses: dict[str, Callable[..., Any]] = {}

    # ---- generate -------------------------------------------------------------------------------

    def stream(self, opened: Open) -> None:
        """A generate dispatch: take feeds, decode, send finished samples on, until drained."""
        call = self._graph.call(opened.call)
        engine = self._hosts.generator(call)
        engine.set_version(opened.version)
        queue = self._link.stream(opened.dispatch)
        drained, spans, samples = False, _Spans(), 0
        stats: list[Finished] = []
        while engine.busy or not drained:
            while not (engine.busy and queue.empty()) and not drained:
                message = queue.get()
                if isinstance(message, Drain):
                    drained = True
                else:
                    with spans:
                        engine.feed([self._prompt(call, group) for group in message.groups])
            if engine.busy:
                with spans:
                    finished = engine.step()
                    self._store_finished(finished)
                if finished:
                    samples += len(finished)
                    stats += finished
                    ids, lengths = [f.sample_id for f in finished], [len(f.tokens) for f in finished]
                    self._link.send(SampleReady(opened.dispatch, self._rank, ids, lengths))
        self._link.close_stream(opened.dispatch)
        report = DispatchDone(opened.dispatch, self._rank, stats=_response_stats(stats), spans=spans.merged)
        self._link.send(report)

    def _prompt(self, call: Call, group: int) -> Prompt:
        host = self._hosts.hosts[str(call.model)]
        tokens = encode_prompt(host.tokenizer, self._data.row(group)["prompt"], call.chat)
        first = group * self._graph.samples
        return Prompt(group, tuple(range(first, first + self._graph.samples)), tuple(tokens))

    def _store_finished(self, finished: Sequence[Finished]) -> None:
        for name in (
            "tokens",
            "logprobs",
            "loss_mask",
            "versions",
            "finish_reason",
            "group_id",
            "completion",
        ):
            self._store.put(name, {f.sample_id: getattr(f, name) for f in finished})

    # ---- infer and train ------------------------------------------------------------------------

    def execute(self, message: Execute) -> None:
        """An infer or train dispatch."""
        self._inputs.wait(message)
        call = self._graph.call(message.call)
        if call.op == "train":
            self._train(call, message)
        else:
            self._infer(call, message)

    def _batches(self, call: Call, ids: Sequence[int]) -> list[Batch]:
        """Packed micro-batches of samples, under the call's token budget."""
        if not ids:
            return []
        values = self._inputs.values(call, ids)
        lengths = [len(tokens) for tokens in values["tokens"]]
        parts = micro_batches(lengths, self._plan.calls[call.name].micro_batch_tokens)
        return [
            pack(
                [ids[i] for i in part],
                [lengths[i] for i in part],
                {name: [column[i] for i in part] for name, column in values.items()},
                self._graph.extents,
                self._graph.dtypes,
            )
            for part in parts
        ]

    def _infer(self, call: Call, message: Execute) -> None:
        spans = _Spans()
        host = self._hosts.hosts[str(call.model)]
        ids = message.shards[0]
        with spans:
            batches = self._batches(call, ids)
            results = infer_logprobs(host.model, batches, call.temperature)
            order = [sample for batch in batches for sample in batch.ids]
            self._store.put(call.writes["logprobs"], dict(zip(order, results, strict=True)))
        self._link.send(DispatchDone(message.dispatch, self._rank, spans=spans.merged))

    def _train(self, call: Call, message: Execute) -> None:
        spans = _Spans()
        host = self._hosts.hosts[str(call.model)]
        assert host.trainer is not None
        if call.name not in self._losses:
            self._losses[call.name] = load_callable(call.decl.name, base=folder_of(self._graph))
        loss = self._losses[call.name]
        reads = {use.name: call.reads[use.name] for use in call.decl.reads if use.name in call.reads}
        values: dict[str, list[float]] = {}
        options = dict(call.options)
        normalise = options.pop("normalise", "token")
        for shard in message.shards:
            with spans:
                mine = self._part(call, shard) if message.whole else shard
                result = host.trainer.step(
                    self._batches(call, mine),
                    loss,
                    reads=reads,
                    options=options,
                    temperature=call.temperature,
                    normalise=normalise,
                    extents={use.name: use.extent for use in call.decl.reads},
                    prefix=str(call.model),
                )
            for name, value in result.items():
                values.setdefault(name, []).append(value)
        means = {name: sum(column) / len(column) for name, column in values.items()}
        self._link.send(DispatchDone(message.dispatch, self._rank, values=means, spans=spans.merged))

    def _part(self, call: Call, ids: Sequence[int]) -> list[int]:
        """This replica's part of a minibatch whose lengths only workers know (tokens from the data)."""
        mesh = self._plan.calls[call.name].mesh
        lengths = dict(zip(ids, map(len, self._data.values("tokens", ids)), strict=True))
        parts = divide(ids, lengths, mesh.layout.dp, float)
        return parts[mesh.coordinate(self._rank)["dp"]]

    # ---- weights --------------------------------------------------------------------------------

    def reallocate(self, message: Reallocate) -> None:
        """Move weights to where the next call wants them; the first time compare checksums."""
        spans = _Spans()
        with spans:
            moved = self._hosts.reallocate(message.model, message.source, message.destination)
        numbers = {"bytes": float(moved.received_bytes), "seconds": moved.seconds}
        stats = {f"realloc/{message.model}/{n}": [value, 1.0, value, value] for n, value in numbers.items()}
        self._link.send(DispatchDone(message.dispatch, self._rank, stats=stats, spans=spans.merged))

    def save(self, message: Save) -> None:
        """This rank's part of a checkpoint: weights by the first replica, optimizer state by every rank."""
        spans = _Spans()
        host = self._hosts.hosts[message.model]
        assert host.trainer is not None
        top = partial_directory(self._run_dir, message.directory)
        ranks = self._plan.calls[self._graph.trained()[message.model].name].ranks
        with spans:
            folder = top / "state" / message.model
            written = [save_state(host.trainer, folder, ranks.index(self._rank), len(ranks))]
            if ranks[0] == self._rank:
                save_model(host.model, host.tokenizer, top / message.model)
                written += sorted((top / message.model).iterdir())
            files = {str(path.relative_to(top)): file_digest(path) for path in written}
        self._link.send(DispatchDone(message.dispatch, self._rank, files=files, spans=spans.merged))


class FunctionTasks:
    """What the function thread does: calls without a model, and records for samples.jsonl."""

    def __init__(
        self, plan: Plan, rank: int, store: FieldStore, inputs: Inputs, data: DataFields, link: MasterLink
    ) -> None:
        self._graph, self._rank, self._store, self._inputs = plan.graph, rank, store, inputs
        self._data, self._link = data, link
        self._functions: dict[str, Callable[..., Any]] = {}
        self._progress = Progress()
        self._running: tuple[str, Call, float] | None = None

    def execute(self, message: Execute) -> None:
        """Run a function on samples and store what it writes."""
        self._inputs.wait(message)
        call, ids = self._graph.call(message.call), message.shards[0]
        spans = _Spans()
        if call.name == RECORD:
            self._link.send(DispatchDone(message.dispatch, self._rank, rows=self._rows(call, ids, message)))
            return
        if call.name not in self._functions:
            self._functions[call.name] = load_callable(call.decl.name, base=folder_of(self._graph))
        values = self._inputs.values(call, ids)
        lengths = message.lengths or [0] * len(ids)
        with spans:
            self._running = (message.dispatch, call, time.monotonic())
            try:
                outputs = run_function(
                    self._functions[call.name],
                    call,
                    ids,
                    values,
                    lengths,
                    self._graph.extents,
                    self._graph.dtypes,
                    progress=self._progress,
                )
            finally:
                self._running = None
        for name, column in outputs.items():
            self._store.put(name, dict(zip(ids, column, strict=True)))
        stats = {METRIC_NAMES.get(n, f"{call.name}/{n}"): v for n, v in numeric_stats(outputs).items()}
        self._link.send(DispatchDone(message.dispatch, self._rank, stats=stats, spans=spans.merged))

    def overdue(self) -> Failed | None:
        """A failure, if the running function has used up its time (asked by the link's thread)."""
        running = self._running
        if running is None or time.monotonic() - running[2] <= running[1].timeout:
            return None
        dispatch, call, _ = running
        sample = self._progress.sample
        error = FunctionError(call.name, call.decl.name, f"ran longer than its {call.timeout:g} s", sample)
        return Failed(self._rank, dispatch, str(error), "")

    def _rows(self, call: Call, ids: Sequence[int], message: Execute) -> list[dict[str, Any]]:
        values = self._inputs.values(call, ids)
        rows = []
        for index, sample in enumerate(ids):
            group = sample // self._graph.samples
            row: dict[str, Any] = {"step": message.step, "sample_id": sample, "group_id": group}
            row |= {name: v for name, v in self._data.row(group).items() if isinstance(v, str | int | float)}
            row |= {name: column[index] for name, column in values.items() if name != "loss_mask"}
            row["length"] = int(values["loss_mask"][index].sum())
            rows.append(row)
        return rows


class _Spans:
    """Intervals of computation; those that touch are one."""

    def __init__(self) -> None:
        self.merged: list[list[float]] = []

    def __enter__(self) -> None:
        self._start = time.time()

    def __exit__(self, *_: object) -> None:
        now = time.time()
        if self.merged and self._start - self.merged[-1][1] < 0.002:
            self.merged[-1][1] = now
        else:
            self.merged.append([self._start, now])


def _response_stats(finished: Sequence[Finished]) -> dict[str, list[float]]:
    """Lengths of responses and how many were cut off."""
    if not finished:
        return {}
    lengths = [float(f.loss_mask.sum()) for f in finished]
    clipped = [float(f.finish_reason == "length") for f in finished]
    return {
        "response_length": [sum(lengths), float(len(lengths)), min(lengths), max(lengths)],
        "response_length/clip_ratio": [sum(clipped), float(len(clipped)), min(clipped), max(clipped)],
    }
