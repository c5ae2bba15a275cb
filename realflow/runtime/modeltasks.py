"""The infer, train, realloc and save dispatches of a worker's main thread (`streams` has generation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from realflow.data.balance import CostModel
from realflow.data.batch import Batch, pack
from realflow.engines.functions import load_callable
from realflow.engines.infer import infer
from realflow.engines.state import save_shards, save_state
from realflow.files import file_digest
from realflow.graph.types import Call
from realflow.models.card import card
from realflow.models.causal import CausalModel
from realflow.models.costs import cost_model
from realflow.models.paths import resolve_model
from realflow.models.save import save_model
from realflow.models.savelora import adapters_folder, save_adapters
from realflow.planfile import Plan
from realflow.runtime.assign import divide, packs, together
from realflow.runtime.directory import partial_directory
from realflow.runtime.dispatches import replicas
from realflow.runtime.fields import DataFields, Inputs, folder_of
from realflow.runtime.hosts import Hosts, positions
from realflow.runtime.link import MasterLink
from realflow.runtime.messages import DispatchDone, Execute, Reallocate, Save
from realflow.runtime.moves import Moves
from realflow.runtime.retokenize import Texts
from realflow.runtime.stats import Spans, Stats, field_stats
from realflow.runtime.store import FieldStore
from realflow.runtime.weights import kept


class ModelTasks:
    """What the main thread does: each message is executed and reported done."""

    def __init__(
        self,
        plan: Plan,
        hosts: Hosts,
        device: torch.device,
        store: FieldStore,
        inputs: Inputs,
        data: DataFields,
        link: MasterLink,
        run_dir: Path,
    ) -> None:
        self._plan, self._graph, self._rank, self._hosts = plan, plan.graph, hosts.rank, hosts
        self._store, self._inputs, self._data, self._link = store, inputs, data, link
        self._run_dir = run_dir
        self._moves = Moves(hosts, device)
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
        parts = packs(self._graph, call, ids, lengths, self._plan.calls[call.name].micro_batch_tokens)
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

    def _texts(self, call: Call, ids: Sequence[int], model: CausalModel) -> tuple[list[Batch], Stats]:
        """Packed micro-batches of texts in tokens of the call's own model, and what is counted of them."""
        values = self._inputs.values(call, ids)
        columns = {name: values[field] for name, field in call.reads.items()}
        texts = Texts(call, self._hosts.tokenizer(str(call.model)), self._graph.data.system, positions(model))
        return texts.batches(columns, ids, self._plan.calls[call.name].micro_batch_tokens)

    def _infer(self, call: Call, message: Execute) -> None:
        """Every rank of a replica works on the replica's samples; the one that speaks has the results."""
        spans, stats = Spans(), Stats()
        output = call.decl.name
        with spans, self._hosts.using(call) as model:
            ids = message.shards[0]
            texts, counts = (None, {}) if call.retokenize is None else self._texts(call, ids, model)
            batches = self._batches(call, ids) if texts is None else texts
            results = infer(model, batches, output, call.temperature)
            if self._rank in replicas(self._plan.calls[call.name]):
                order = [sample for batch in batches for sample in batch.ids]
                values = [plain(result, call) for result in results]
                self._store.put(call.writes[output], dict(zip(order, values, strict=True)))
                stats = field_stats(call.name, {call.writes[output]: values})
                stats |= self._data.lengths.of_samples(call, ids, self._data.values) | counts
        self._link.send(DispatchDone(message.dispatch, self._rank, stats=stats, spans=spans.merged))

    def _train(self, call: Call, message: Execute) -> None:
        spans = Spans()
        if call.name not in self._losses:
            self._losses[call.name] = load_callable(call.decl.name, base=folder_of(self._graph))
        loss = self._losses[call.name]
        reads = {use.name: use.name for use in call.decl.reads if use.name in call.reads}
        values: dict[str, list[float]] = {}
        options = dict(call.options)
        normalise = options.pop("normalise", "token")
        seen: list[int] = []
        with spans, self._hosts.using(call):
            for shard in message.shards:
                mine = self._part(call, shard) if message.whole else shard
                seen += mine
                result = self._hosts.trainer(str(call.model)).step(
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
        stats = Stats()
        if self._rank in replicas(self._plan.calls[call.name]):
            stats = self._data.lengths.of_samples(call, seen, self._data.values)
        self._link.send(
            DispatchDone(message.dispatch, self._rank, stats=stats, values=means, spans=spans.merged)
        )

    def _part(self, call: Call, ids: Sequence[int]) -> list[int]:
        """This replica's part of a minibatch whose lengths only workers know (tokens from the data)."""
        mesh = self._plan.calls[call.name].mesh
        tokens = self._data.values(call.reads["tokens"], ids)
        lengths = dict(zip(ids, map(len, tokens), strict=True))
        groups = together(self._graph, call, ids)
        parts = divide(ids, lengths, mesh.layout.dp, self._cost(str(call.model)), groups)
        return parts[mesh.coordinate(self._rank)["dp"]]

    def _cost(self, model: str) -> CostModel:
        """The time of a sequence, as the master estimates it."""
        if model not in self._costs:
            self._costs[model] = cost_model(card(resolve_model(self._graph.models[model].path)))
        return self._costs[model]

    def reallocate(self, message: Reallocate) -> None:
        """Move weights along an edge, before a call runs that needs them."""
        spans = Spans()
        if message.edge not in self._moves:
            self._moves.add(self._link.take_slice(message.edge))
        with spans:
            part, moved, verify = self._moves.run(message.edge, message.version)
        numbers = {
            "bytes": float(moved.received_bytes),
            "sent_bytes": float(moved.sent_bytes),
            "shared_bytes": float(moved.shared_bytes),
            "seconds": moved.seconds,
            "verify_seconds": verify,
            "floor_seconds": part.floor_seconds,
        }
        stats = {f"realloc/{part.into}/{name}": [x, 1.0, x, x] for name, x in numbers.items()}
        self._link.send(DispatchDone(message.dispatch, self._rank, stats=stats, spans=spans.merged))

    def save(self, message: Save) -> None:
        """This rank's part of a checkpoint: weights by the first replica, optimizer state by every rank."""
        spans, call = Spans(), kept(self._graph)[message.model]
        top = partial_directory(self._run_dir, message.directory)
        folder, files = top / "state" / message.model, {}
        with spans, self._hosts.using(call) as model:
            shard = None
            if call.op == "train":
                shard = save_state(self._hosts.trainer(message.model), folder)
            elif average := self._hosts.average(call):
                shard = save_shards(model, average.shards(model.place), message.step, folder)
            if shard is not None:
                files[str(shard.relative_to(top))] = file_digest(shard)
            lora, tokenizer = self._graph.models[message.model].lora, self._hosts.tokenizer(message.model)
            written = {}
            if lora is None or lora.save == "merged":
                written[top / message.model] = save_model(model, tokenizer, top / message.model)
            if lora is not None:
                beside = adapters_folder(top / message.model, lora)
                written[beside] = save_adapters(model, tokenizer, beside)
            for folder, sums in written.items():
                files |= {str(folder.relative_to(top) / name): digest for name, digest in sums.items()}
        self._link.send(DispatchDone(message.dispatch, self._rank, files=files, spans=spans.merged))


def plain(result: torch.Tensor, call: Call) -> torch.Tensor | float:
    """What an infer call found for a sample, as it is stored: a number where it writes one a sample."""
    return float(result) if call.decl.writes[0].extent == "sample" else result
