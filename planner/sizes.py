"""What one rank has of a model, in numbers that a card and a decoder's config both give. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from planner.adapters import Low, low_of
from realflow.graph.types import Graph, LoraSpec
from realflow.layout import Layout, box_size, cut
from realflow.models.adapters import adapter_cut
from realflow.models.card import ITEMSIZE, Card
from realflow.models.partition import Partition, partition, with_head
from realflow.planfile.holdings import Holding

NormKind = Literal["rms", "gemma", "layer"]

ALIGNMENT = 32
"""Elements of the flat buffer from one parameter's begin to another's are a multiple of it."""


@dataclass(frozen=True)
class Part:
    """What one holding has of a model: `dtype` is that of its compute weights.

    `elements` are the parameters held; `kv_heads` the key and value heads that are computed here,
    `cached_heads` those that generation stores. `intermediate` is how many columns of MLPs a token
    passes through here (of experts: the active ones'), `logits` how many columns of logits are computed
    here: none before the last stage, and none of a model with another head. `stored` is `elements` with what
    lies between parameters so that they begin at round addresses. `gated` MLPs multiply two products;
    `head_norms` normalise queries and keys; a layer has `norms` over the hidden dim, of kind `norm` (Gemma's
    multiply in float32). `stage`, `stages` and `parts` (tensor ranks) are those
    of the holding. `low` are the adapters that are trained instead of all this; where they are merged in they
    count too, though they are not there: a few hundredths too much.
    """

    dtype: str
    elements: int
    hidden: int
    layers: int
    query_heads: int
    kv_heads: int
    cached_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    logits: int
    positions: int
    stored: int
    tied: bool = False
    gated: bool = True
    head_norms: bool = False
    norms: int = 2
    norm: NormKind = "rms"
    stage: int = 0
    stages: int = 1
    parts: int = 1
    low: Low | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of one weight or activation."""
        return ITEMSIZE[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the compute weights."""
        beside = -self.stored % ALIGNMENT + self.low.stored if self.low else 0
        return (self.stored + beside) * self.itemsize

    @property
    def trained(self) -> int:
        """Elements that are trained, with what lies between them."""
        return self.low.stored if self.low else self.stored

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends in a norm and a head."""
        return self.stage == self.stages - 1


class Parts:
    """The parts of a graph's models, each made once, from their cards."""

    def __init__(self, graph: Graph, cards: Mapping[str, Card]) -> None:
        self._models, self._cards = graph.models, cards
        self._known: dict[tuple[str, Holding], Part] = {}

    def of(self, model: str, holding: Holding) -> Part:
        """What a holding has of a model. Raises InputError where it cannot be cut so."""
        if (model, holding) not in self._known:
            spec = self._models[model]
            layout = Layout(tp=holding.parts, pp=holding.stages)
            whole = partition(with_head(self._cards[model], spec.head), layout)
            for pp in range(holding.stages):
                for tp in range(holding.parts):
                    place = Holding(pp, holding.stages, tp, holding.parts)
                    self._known[model, place] = part_of(whole, place, spec.dtype, spec.head, spec.lora)
        return self._known[model, holding]


def part_of(whole: Partition, place: Holding, dtype: str, head: str, lora: LoraSpec | None = None) -> Part:
    """What the holding `place` has of a model that is cut so. Raises InputError for adapters of layers that
    the model does not have."""
    card, stage = whole.card, whole.stages[place.pp]
    names = [p.name.rsplit(".", 2)[-2] for p in card.parameters if p.name.count(".") > 1]
    norms = sum(p.shape == (card.hidden,) and p.name.endswith("norm.weight") for p in card.parameters)
    boxes = [box_size(box) for box in whole.boxes(place.pp, place.tp).values()]
    query, held = whole.query_heads(place.tp), whole.kv_heads(place.tp)
    vocabulary = whole.vocabulary(place.tp)
    ends = place.pp == place.stages - 1
    return Part(
        dtype=dtype,
        elements=sum(boxes),
        hidden=card.hidden,
        layers=stage.stop - stage.first,
        query_heads=query[1] - query[0],
        kv_heads=held[1] - held[0],
        cached_heads=_cached(query, card.heads // card.kv_heads),
        head_dim=card.head_dim,
        intermediate=_length(cut(card.intermediate, place.parts, place.tp)),
        vocab=card.vocab,
        logits=_length(vocabulary) if head == "lm" and ends else 0,
        positions=card.max_positions,
        stored=_stored(boxes),
        tied=bool(card.tied),
        gated="gate_proj" in names or "gate_up_proj" in names,
        head_norms="q_norm" in names,
        norms=(norms - 1) // card.layers,
        norm=_norm(card),
        stage=place.pp,
        stages=place.stages,
        parts=place.parts,
        low=low_of(adapter_cut(whole, lora), place) if lora else None,
    )


def _norm(card: Card) -> NormKind:
    if card.model_type.startswith("gemma"):
        return "gemma"
    return "layer" if any(p.name.endswith("norm.bias") for p in card.parameters) else "rms"


def _stored(sizes: Iterable[int]) -> int:
    """Elements of a flat buffer of parameters, each of which begins at a multiple of `ALIGNMENT`; the run has
    less between parameters that it reads as one."""
    end = 0
    for size in sizes:
        end = -(-end // ALIGNMENT) * ALIGNMENT + size
    return end


def _length(interval: tuple[int, int]) -> int:
    return interval[1] - interval[0]


@lru_cache(maxsize=4096)
def _cached(query: tuple[int, int], group: int) -> int:
    """Key and value heads that the query heads of a rank use, where `group` use one."""
    return -(-query[1] // group) - query[0] // group
