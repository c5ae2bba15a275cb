"""Where a worker finds the values that a call reads: its own store, other workers, or the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from realflow.data.source import Source, open_source
from realflow.data.text import encode_pair
from realflow.graph.types import Call, Graph
from realflow.models.paths import resolve_model
from realflow.planfile import Plan
from realflow.runtime.hosts import Hosts
from realflow.runtime.messages import Execute
from realflow.runtime.store import FieldStore
from realflow.runtime.transport import FieldClient

Tokenize = Callable[[Any, Any], tuple[list[int], list[bool]]]


class DataFields:
    """Fields of the data section: a function of the sample id, so they are made where they are read."""

    def __init__(self, graph: Graph, source: Source, tokenize: Tokenize | None) -> None:
        self._samples = graph.samples
        self._source = source
        self._tokenize = tokenize
        self.row = lru_cache(maxsize=4096)(self._row)

    def _row(self, group: int) -> dict[str, Any]:
        row = dict(self._source.row(group))
        if self._tokenize is not None:
            tokens, mask = self._tokenize(row["prompt"], row["completion"])
            row["tokens"] = torch.tensor(tokens, dtype=torch.int64)
            row["loss_mask"] = torch.tensor(mask, dtype=torch.bool)
        return row

    def values(self, field: str, ids: Sequence[int]) -> list[Any]:
        """The field for each sample id."""
        return [self.row(sample // self._samples)[field] for sample in ids]


def pair_tokenizer(tokenizer: Any, chat: bool, max_length: int | None) -> Tokenize:
    """`encode_pair` with its settings bound."""
    return lambda prompt, completion: encode_pair(tokenizer, prompt, completion, chat, max_length)


def folder_of(graph: Graph) -> Path | None:
    """Where the graph's file lies: relative data paths and the user's functions start there."""
    return Path(graph.folder) if graph.folder else None


def make_data(plan: Plan, hosts: Hosts) -> DataFields:
    """The data section as this worker reads it.

    Where calls of this rank read the data's tokens and none runs the model that tokenizes them, its
    tokenizer alone is loaded.
    """
    graph, spec = plan.graph, plan.graph.data
    source = open_source(spec, seed=graph.seed, base=folder_of(graph))
    if spec.tokenize is None:
        return DataFields(graph, source, None)
    tokenizer = hosts.tokenizer(spec.tokenize)
    if tokenizer is None:
        if not _reads_data_tokens(plan, hosts.rank):
            return DataFields(graph, source, None)
        path = resolve_model(graph.models[spec.tokenize].path)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return DataFields(graph, source, pair_tokenizer(tokenizer, spec.chat, spec.max_length))


def _reads_data_tokens(plan: Plan, rank: int) -> bool:
    """Whether a call of this rank reads a field for each token that the data writes."""
    return any(
        plan.graph.extents.get(field) == "token" and plan.graph.writer(field) is None
        for call in plan.graph.calls
        if rank in plan.calls[call.name].ranks
        for field in call.reads.values()
    )


class Inputs:
    """Brings what an `Execute` names to this worker, ahead of its turn, in a thread of its own."""

    def __init__(
        self, rank: int, graph: Graph, store: FieldStore, client: FieldClient, data: DataFields
    ) -> None:
        self._rank, self._graph, self._store, self._client, self._data = rank, graph, store, client, data
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
        for field in dict.fromkeys(call.reads.values()):
            if self._graph.writer(field) is None:
                found[field] = self._data.values(field, ids)
            else:
                found[field] = self._store.get(field, ids)
        return found

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
