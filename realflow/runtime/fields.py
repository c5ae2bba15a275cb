"""Where a worker finds the values that a call reads: its own store, other workers, or the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from realflow.data.source import Prompts, open_source
from realflow.data.text import encode_pair
from realflow.graph.types import SIDES, Call, DataSpec, Graph
from realflow.models.paths import resolve_model
from realflow.planfile import Plan
from realflow.runtime.hosts import Hosts
from realflow.runtime.messages import Execute
from realflow.runtime.store import FieldStore
from realflow.runtime.textlengths import LengthCounts, without_long
from realflow.runtime.transport import FieldClient

Tokenize = Callable[..., tuple[list[int], list[bool]]]
"""Tokens and mask of a prompt and a completion; with `whole` as long as they are."""


class DataFields:
    """Fields of the data section: a function of the sample id, so they are made where they are read.

    Of pairs, prompt g has the samples 2g (the chosen completion) and 2g + 1 (the rejected one).
    """

    def __init__(self, graph: Graph, source: Prompts, tokenize: Tokenize | None) -> None:
        self._samples = graph.samples
        self._source = source
        self._tokenize = tokenize
        self._texts = SIDES if graph.data.pairs else ("completion",)
        self._pairs = graph.data.pairs
        self.row = lru_cache(maxsize=4096)(self._row)
        self._written = lru_cache(maxsize=4096)(self._write)
        self.lengths = LengthCounts(graph, source, None if tokenize is None else self._whole_length)

    def _row(self, group: int) -> dict[str, Any]:
        """The columns of a prompt; the texts of pairs, which samples have instead, are left out."""
        row = dict(self._source.row(group))
        return {name: value for name, value in row.items() if not self._pairs or name not in SIDES}

    def _write(self, group: int) -> list[dict[str, Any]]:
        """What the data section itself writes of each of a prompt's samples."""
        row = self._source.row(group) if self._tokenize is not None else {}
        found = []
        for text in self._texts:
            fields: dict[str, Any] = {"group_id": group, "chosen": text == SIDES[0]} if self._pairs else {}
            if self._tokenize is not None:
                tokens, mask = self._tokenize(row["prompt"], row[text])
                fields["tokens"] = torch.tensor(tokens, dtype=torch.int64)
                fields["loss_mask"] = torch.tensor(mask, dtype=torch.bool)
            found.append(fields)
        return found

    def _whole_length(self, group: int, side: int) -> int:
        """Tokens of a sample before it is cut."""
        assert self._tokenize is not None
        row = self._source.row(group)
        text = self._texts[side if self._pairs else 0]
        return len(self._tokenize(row["prompt"], row[text], whole=True)[0])

    def values(self, field: str, ids: Sequence[int]) -> list[Any]:
        """The field for each sample id."""
        found = []
        for sample in ids:
            group, place = divmod(sample, self._samples)
            written = self._written(group)[place if self._pairs else 0]
            found.append(written[field] if field in written else self.row(group)[field])
        return found


def pair_tokenizer(tokenizer: Any, spec: DataSpec) -> Tokenize:
    """`encode_pair` with the settings of the data."""

    def encode(prompt: Any, completion: Any, *, whole: bool = False) -> tuple[list[int], list[bool]]:
        most = None if whole else spec.max_length
        return encode_pair(
            tokenizer, prompt, completion, spec.chat, most, system=spec.system, cut=spec.over != "error"
        )

    return encode


def folder_of(graph: Graph) -> Path | None:
    """Where the graph's file lies: relative data paths and the user's functions start there."""
    return Path(graph.folder) if graph.folder else None


def make_data(plan: Plan, hosts: Hosts) -> DataFields:
    """The data section as this worker reads it.

    Where calls of this rank read the data's tokens and none runs the model that tokenizes them, its
    tokenizer alone is loaded; so are all that say which rows are too long, where these are dropped: every
    worker must leave out the same.
    """
    graph, spec = plan.graph, plan.graph.data

    def tokenizer(model: str) -> Any:
        found = hosts.tokenizer(model)
        if found is None:
            path = resolve_model(graph.models[model].path)
            found = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return found

    source = open_source(spec, seed=graph.seed, base=folder_of(graph))
    source = without_long(graph, source, lru_cache(tokenizer))
    model = spec.tokenize
    if model is None or (hosts.tokenizer(model) is None and not _reads_data_tokens(plan, hosts.rank)):
        return DataFields(graph, source, None)
    return DataFields(graph, source, pair_tokenizer(tokenizer(model), spec))


def _reads_data_tokens(plan: Plan, rank: int) -> bool:
    """Whether a call of this rank reads a field for each token that the data writes."""
    return any(
        plan.graph.extents.get(field) == "token" and plan.graph.writer(field) is None
        for call in plan.graph.calls
        if rank in plan.calls[call.name].ranks
        for field in call.reads.values()
    )


@dataclass(frozen=True)
class Examination:
    """The evaluation that belongs to a run: a graph of its own, and its data."""

    graph: Graph
    data: DataFields

    def has(self, call: Call) -> bool:
        """Whether a call is one of its."""
        return any(call.name == own.name for own in self.graph.calls)


def make_examination(plan: Plan, hosts: Hosts) -> Examination | None:
    """The evaluation as this worker reads it; None where the run has none."""
    if plan.graph.evaluate is None:
        return None
    graph = plan.graph.evaluate.graph
    return Examination(graph, make_data(replace(plan, graph=graph), hosts))


def scene(
    call: Call, graph: Graph, data: DataFields, examination: Examination | None
) -> tuple[Graph, DataFields]:
    """The graph and the data that a call belongs to: those of the run, or of its evaluation."""
    if examination is not None and examination.has(call):
        return examination.graph, examination.data
    return graph, data


class Inputs:
    """Brings what an `Execute` names to this worker, ahead of its turn, in a thread of its own."""

    def __init__(
        self,
        rank: int,
        graph: Graph,
        store: FieldStore,
        client: FieldClient,
        data: DataFields,
        examination: Examination | None = None,
    ) -> None:
        self._rank, self._graph, self._store, self._client, self._data = rank, graph, store, client, data
        self._examination = examination
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._fetches: dict[str, Future[None]] = {}

    def prefetch(self, message: Execute) -> None:
        """Start to fetch (the link calls this as soon as the message is there)."""
        self._fetches[message.dispatch] = self._thread.submit(self._fetch, message)

    def _fetch(self, message: Execute) -> None:
        wanted = [
            (owner, field, self._store.missing(field, ids))
            for field, owner, ids in message.inputs
            if owner != self._rank
        ]
        fetches = [fetch for fetch in wanted if fetch[2]]
        for (_, field, _), values in zip(fetches, self._client.fetch_many(fetches), strict=True):
            self._store.put(field, values)

    def wait(self, message: Execute) -> None:
        """Until everything that the message names is here; raises what the fetch raised."""
        self._fetches.pop(message.dispatch).result()

    def values(self, call: Call, ids: Sequence[int]) -> dict[str, list[Any]]:
        """Graph field -> a value for each id, for every field that the call reads and that exists."""
        found: dict[str, list[Any]] = {}
        graph, data = scene(call, self._graph, self._data, self._examination)
        for field in dict.fromkeys(call.reads.values()):
            if graph.writer(field) is None:
                found[field] = data.values(field, ids)
            else:
                found[field] = self._store.get(field, ids)
        return found

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
