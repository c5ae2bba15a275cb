"""The infer, train, realloc and save dispatches of a worker's main thread (`streams` has generation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from realflow.data.balance import CostModel, micro_batches
from realflow.data.batch import Batch, pack
from realflow.engines.functions import load_callable
from realflow.engines.infer import infer_logprobs
from realflow.engines.state import save_state
from realflow.files import file_digest
from realflow.graph.types import Call
from realflow.models.card import card
from realflow.models.costs import cost_model
from realflow.models.paths import resolve_model
from realflow.models.save import save_model
from realflow.planfile import Plan
from realflow.runtime.assign import divide
from realflow.runtime.directory import partial_directory
from realflow.runtime.fields import DataFields, Inputs, folder_of
from realflow.runtime.hosts import Hosts
from realflow.runtime.link import MasterLink
from realflow.runtime.messages import DispatchDone, Execute, Reallocate, Save
from realflow.runtime.stats import Spans
from realflow.runtime.store import FieldStore


class ModelTasks:
    """What the main thread does: each message is executed and reported done."""

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
        self._costs: dict[str, CostModel] = {}

    def execute(self, message: Execute) -> None:
        """An infer or train dispatch."""
        self._inputs.wait(message)
        call = self._graph.call(message.call)
        if call.op == "train":
            self._train(call, message)
        else:
            self._infer(call, message)

    def _batches(self, call: Call, ids: Sequence[int]) -> list[Batch]:
        """Packed micro-batches of samples, under the call's token budget.

        Fields have the names under which the call's function reads them, not the graph's.
        """
        if not ids:
            return []
        values = self._inputs.values(call, ids)
        lengths = [len(tokens) for tokens in values[call.reads["tokens"]]]
        parts = micro_batches(lengths, self._plan.calls[call.name].micro_batch_tokens)
        extents = {name: self._graph.extents[field] for name, field in call.reads.items()}
        dtypes = {name: self._graph.dtypes[field] for name, field in call.reads.items()}
        return [
            pack(
                [ids[i] for i in part],
                [lengths[i] for i in part],
                {name: [values[field][i] for i in part] for name, field in call.reads.items()},
                extents,
                dtypes,
            )
            for part in parts
        ]

    def _infer(self, call: Call, message: Execute) -> None:
        spans = Spans()
        host = self._hosts.hosts[str(call.model)]
        ids = message.shards[0]
        with spans:
            batches = self._batches(call, ids)
            results = infer_logprobs(host.model, batches, call.temperature)
            order = [sample for batch in batches for sample in batch.ids]
            self._store.put(call.writes["logprobs"], dict(zip(order, results, strict=True)))
        self._link.send(DispatchDone(message.dispatch, self._rank, spans=spans.merged))

    def _train(self, call: Call, message: Execute) -> None:
        spans = Spans()
        host = self._hosts.hosts[str(call.model)]
        assert host.trainer is not None
        if call.name not in self._losses:
            self._losses[call.name] = load_callable(call.decl.name, base=folder_of(self._graph))
        loss = self._losses[call.name]
        reads = {use.name: use.name for use in call.decl.reads if use.name in call.reads}
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
        tokens = self._data.values(call.reads["tokens"], ids)
        lengths = dict(zip(ids, map(len, tokens), strict=True))
        parts = divide(ids, lengths, mesh.layout.dp, self._cost(str(call.model)))
        return parts[mesh.coordinate(self._rank)["dp"]]

    def _cost(self, model: str) -> CostModel:
        """The time of a sequence, as the master estimates it."""
        if model not in self._costs:
            self._costs[model] = cost_model(card(resolve_model(self._graph.models[model].path)))
        return self._costs[model]

    def reallocate(self, message: Reallocate) -> None:
        """Copy weights to ranks that lack them, before a call runs there."""
        spans = Spans()
        with spans:
            moved = self._hosts.reallocate(message.model, message.sources, message.destinations)
        numbers = {"bytes": float(moved.received_bytes), "seconds": moved.seconds}
        stats = {f"realloc/{message.model}/{n}": [value, 1.0, value, value] for n, value in numbers.items()}
        self._link.send(DispatchDone(message.dispatch, self._rank, stats=stats, spans=spans.merged))

    def save(self, message: Save) -> None:
        """This rank's part of a checkpoint: weights by the first replica, optimizer state by every rank."""
        spans = Spans()
        host = self._hosts.hosts[message.model]
        assert host.trainer is not None
        top = partial_directory(self._run_dir, message.directory)
        ranks = self._plan.calls[self._graph.trained()[message.model].name].ranks
        with spans:
            folder = top / "state" / message.model
            shard = save_state(host.trainer, folder, ranks.index(self._rank), len(ranks))
            files = {str(shard.relative_to(top)): file_digest(shard)}
            if ranks[0] == self._rank:
                sums = save_model(host.model, host.tokenizer, top / message.model)
                files |= {f"{message.model}/{name}": digest for name, digest in sums.items()}
        self._link.send(DispatchDone(message.dispatch, self._rank, files=files, spans=spans.merged))
