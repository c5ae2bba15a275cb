"""Prompts and pairs of the data that are too long for the calls that read them: dropped, cut and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from realflow.data.lengths import FittingPrompts, counted
from realflow.data.source import Prompts
from realflow.data.text import encode_pair, encode_prompt
from realflow.graph.types import SIDES, Call, Graph
from realflow.runtime.readiness import main_rollout
from realflow.runtime.stats import Stats

DROPPED, TRUNCATED = "data/dropped", "data/truncated"
Values = Callable[[str, Sequence[int]], Sequence[Any]]


def without_long(graph: Graph, source: Prompts, tokenizer: Callable[[str], Any]) -> Prompts:
    """The prompts; with `over: drop` without those that are too long for a generate call, or too long a
    pair, by the tokenizer of the model (`tokenizer(name)`) that reads them."""
    spec = graph.data
    if spec.over != "drop":
        return source
    limit = spec.prompt_tokens
    # Calls that read the same prompt through the same model say the same.
    readers = {
        (call.model, call.chat, call.reads["prompt"]): tokenizer(str(call.model))
        for call in graph.calls
        if call.op == "generate"
    }
    texts = SIDES if spec.pairs else ("completion",)
    pairs = None if spec.tokenize is None else tokenizer(spec.tokenize)

    def fits(row: Mapping[str, Any]) -> bool:
        for (_, chat, field), reader in readers.items():
            if len(encode_prompt(reader, row[field], chat, spec.system)) > limit:
                return False
        if pairs is None:
            return True
        found = (encode_pair(pairs, row["prompt"], row[x], spec.chat, system=spec.system)[0] for x in texts)
        return all(len(tokens) <= limit for tokens in found)

    return FittingPrompts(source, fits, limit)


class LengthCounts:
    """How many prompts, or tokenized samples, of a dispatch were in the place of others, or were cut."""

    def __init__(self, graph: Graph, source: Prompts, pair_length: Callable[[int, int], int] | None) -> None:
        """`pair_length(group, place)` is the length of a sample that is not cut; None where the data is not
        tokenized."""
        self._graph, self._source, self._pair_length = graph, source, pair_length
        self._counting = _counting(graph)

    def of_prompts(self, call: Call, cut: Mapping[int, bool]) -> Stats:
        """Of the prompts that were fed to a generate call: group -> whether it was cut."""
        if call.name != self._counting or not cut:
            return {}
        stats = self._dropped(list(cut))
        if self._graph.data.over == "truncate":
            stats[TRUNCATED] = counted(list(cut.values()))
        return stats

    def of_samples(self, call: Call, ids: Sequence[int], values: Values) -> Stats:
        """Of samples that the data tokenizes; `values(field, ids)` gives their tokens."""
        spec, whole = self._graph.data, self._pair_length
        if call.name != self._counting or not ids or spec.max_length is None or whole is None:
            return {}
        size = self._graph.samples
        stats = self._dropped([sample // size for sample in ids])
        if spec.over in (None, "truncate"):
            # What is shorter than the limit was not cut; the others are few, and are looked at again.
            full = [len(tokens) == spec.max_length for tokens in values(call.reads["tokens"], ids)]
            stats[TRUNCATED] = counted(
                [
                    suspect and whole(*divmod(i, size)) > spec.max_length
                    for i, suspect in zip(ids, full, strict=True)
                ]
            )
        return stats

    def _dropped(self, groups: Sequence[int]) -> Stats:
        if not isinstance(self._source, FittingPrompts):
            return {}
        return {DROPPED: counted([self._source.dropped(group) > 0 for group in groups])}


def _counting(graph: Graph) -> str | None:
    """The one call at which the texts of a step are counted: the main rollout, or else the first call of a
    model that reads tokens of the data."""
    rollout = main_rollout(graph)
    if rollout is not None:
        return rollout.name
    for call in graph.calls:
        field = call.reads.get("tokens")
        if call.model is not None and field is not None and graph.writer(field) is None:
            return call.name
    return None
