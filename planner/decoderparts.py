"""Parts of models known by a Hugging Face config alone, and what a call needs on all of its ranks. Pure.

needed = option_bytes(graph, call, how, decoder, longest, host=False)      -> CallBytes
needed.weights, needed.own_bytes, needed.active_bytes             its static, own and active bytes
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from planner.adapters import decoder_low
from planner.callbytes import CallBytes, call_bytes
from planner.decoder import Decoder, stage_cuts
from planner.formulas.numbers import stage_elements
from planner.formulas.shares import shares
from planner.formulas.values import Cut
from planner.loads import How, worst_load
from planner.sizes import Part, Parts
from realflow.graph.types import Call, Graph, LoraSpec
from realflow.models.card import Card
from realflow.planfile.holdings import Holding


def option_bytes(
    graph: Graph,
    call: Call,
    how: How,
    decoder: Decoder,
    longest: tuple[int, int],
    *,
    context: int = 1,
    experts: int = 1,
    host: bool = False,
) -> CallBytes:
    """What a call of a model needs on each of its ranks, taken on the rank that needs most, for the longest
    prompt and response (`Lengths.longest_prompt`, `longest_response`).

    `context` and `experts` are the ranks of the layout letters c and e. Tens of thousands a second.
    """
    cut = Cut(how.layout.tp, how.layout.pp, context, experts, how.sequence_parallel)
    spec = graph.models[str(call.model)]
    load = worst_load(graph, call, how, longest, decoder.max_positions)
    found = [
        call_bytes(graph, call, how, part, load, host=host)
        for part in decoder_parts(decoder, spec.dtype, cut, spec.lora)
    ]
    return CallBytes(
        max(one.weights for one in found),
        max(found, key=lambda one: one.own_bytes).own,
        max(found, key=lambda one: one.active_bytes).active,
    )


@lru_cache(maxsize=65536)
def decoder_parts(decoder: Decoder, dtype: str, cut: Cut, lora: LoraSpec | None = None) -> tuple[Part, ...]:
    """The part of each pipeline stage, on the tensor rank that has most. Of stages in the middle the first
    and the widest stand for all."""
    stages = stage_cuts(decoder, cut.p)
    kept = {0, 1, len(stages) - 1} & set(range(len(stages)))
    widest = max(range(len(stages)), key=lambda index: stages[index][1] - stages[index][0])
    return tuple(_part(decoder, dtype, cut, lora, index, *stages[index]) for index in sorted(kept | {widest}))


def _part(
    decoder: Decoder, dtype: str, cut: Cut, lora: LoraSpec | None, stage: int, first: int, stop: int
) -> Part:
    counts = decoder.kinds(first, stop)
    columns = 0
    for kind, count in counts.items():
        share = shares(decoder, kind, cut)
        columns += count * (share.columns + share.shared_columns + share.active * share.expert_columns)
    share = shares(decoder, next(iter(counts)), cut)
    elements = stage_elements(decoder, cut, first, stop)
    ends = stop == len(decoder.layers)
    return Part(
        dtype=dtype,
        elements=elements,
        stored=elements,
        hidden=decoder.hidden,
        layers=stop - first,
        query_heads=share.heads,
        kv_heads=share.held_kv_heads,
        cached_heads=share.used_kv_heads,
        head_dim=decoder.head_dim,
        intermediate=-(-columns // (stop - first)),
        vocab=decoder.vocab,
        logits=share.vocab if decoder.head == "lm" and ends else 0,
        positions=decoder.max_positions,
        tied=decoder.tied,
        gated=decoder.gated,
        head_norms=decoder.head_norms,
        norms=decoder.layer_norms,
        norm="gemma" if decoder.model_type.startswith("gemma") else decoder.norm,
        stage=stage,
        stages=cut.p,
        parts=cut.t,
        low=decoder_low(decoder, cut, first, stop, lora) if lora else None,
    )


class AllParts(Parts):
    """The parts of a graph's models: from their cards, and from `decoders` those that have none. (Of these
    every tensor rank is taken to have as much as the one that has most.)"""

    def __init__(self, graph: Graph, cards: Mapping[str, Card], decoders: Mapping[str, Decoder]) -> None:
        super().__init__(graph, cards)
        self._graph, self._without = graph, {name: d for name, d in decoders.items() if name not in cards}

    def of(self, model: str, holding: Holding) -> Part:
        """What a holding has of a model. Raises InputError where it cannot be cut so."""
        if model not in self._without:
            return super().of(model, holding)
        decoder, cut = self._without[model], Cut(holding.parts, holding.stages)
        first, stop = stage_cuts(decoder, holding.stages)[holding.pp]
        spec = self._graph.models[model]
        return _part(decoder, spec.dtype, cut, spec.lora, holding.pp, first, stop)
