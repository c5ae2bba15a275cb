"""Bytes of one rank's part of a model: weights, optimizer, KV cache, activations, logits. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from realflow.graph.types import Call, Graph
from realflow.layout import Layout, box_size, cut
from realflow.models.card import ITEMSIZE, Card
from realflow.models.partition import Partition, partition, with_head
from realflow.planfile import CallPlan
from realflow.planfile.holdings import Holding

LOGIT_ROWS = 1024
"""Rows of logits that exist at once in training and inference."""

MESSAGES = 4
"""Hidden states of a micro-batch under way between a stage and a neighbour: two there, two back."""


@dataclass(frozen=True)
class Part:
    """What one holding has of a model: `dtype` is that of its compute weights."""

    cut: Partition
    holding: Holding
    dtype: str
    has_logits: bool

    @property
    def card(self) -> Card:
        """Of the whole model."""
        return self.cut.card

    @property
    def itemsize(self) -> int:
        """Bytes of one weight or activation."""
        return ITEMSIZE[self.dtype]

    @cached_property
    def elements(self) -> int:
        """Parameters held."""
        return sum(map(box_size, self.cut.boxes(self.holding.pp, self.holding.tp).values()))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the compute weights."""
        return self.elements * self.itemsize

    @property
    def layers(self) -> int:
        """Decoder layers of the stage."""
        stage = self.cut.stages[self.holding.pp]
        return stage.stop - stage.first

    @property
    def query_heads(self) -> int:
        """Attention heads of the tensor rank."""
        start, stop = self.cut.query_heads(self.holding.tp)
        return stop - start

    @property
    def kv_heads(self) -> int:
        """Key and value heads that the tensor rank holds."""
        start, stop = self.cut.kv_heads(self.holding.tp)
        return stop - start

    @property
    def cached_heads(self) -> int:
        """Key and value heads that generation caches: those that the rank's query heads use."""
        start, stop = self.cut.query_heads(self.holding.tp)
        group = self.card.heads // self.card.kv_heads
        return -(-stop // group) - start // group

    @property
    def intermediate(self) -> int:
        """Columns of the MLP on the tensor rank."""
        start, stop = cut(self.card.intermediate, self.holding.parts, self.holding.tp)
        return stop - start

    @property
    def logits(self) -> int:
        """Columns of the logits that this part computes: none before the last stage."""
        if not self.has_logits or self.holding.pp < self.holding.stages - 1:
            return 0
        start, stop = self.cut.vocabulary(self.holding.tp)
        return stop - start


class Parts:
    """The parts of a graph's models, each made once."""

    def __init__(self, graph: Graph, cards: Mapping[str, Card]) -> None:
        self._models, self._cards = graph.models, cards
        self._known: dict[tuple[str, Holding], Part] = {}

    def of(self, model: str, holding: Holding) -> Part:
        """What a holding has of a model. Raises InputError where it cannot be cut so."""
        if (model, holding) not in self._known:
            spec = self._models[model]
            whole = partition(
                with_head(self._cards[model], spec.head), Layout(tp=holding.parts, pp=holding.stages)
            )
            for pp in range(holding.stages):
                for tp in range(holding.parts):
                    place = Holding(pp, holding.stages, tp, holding.parts)
                    self._known[model, place] = Part(whole, place, spec.dtype, spec.head == "lm")
        return self._known[model, holding]


def training_bytes(part: Part, dp: int) -> tuple[int, int]:
    """Bytes of (masters and two moments, gradients) on one rank.

    They are float32, float64 for a float64 model; the first is sharded over dp (ZeRO-1). Where the
    compute weights have that dtype too, they are the masters.
    """
    size = 8 if part.dtype == "float64" else 4
    states = 2 if part.itemsize == size else 3
    return -(-states * size * part.elements // dp), size * part.elements


def kv_bytes(part: Part, call: Call, slots: int, prompt_tokens: int) -> int:
    """Bytes of a generate call's KV cache: keys and values of every slot at its full length, in the
    layers and heads of this part."""
    length = sequence_tokens(part.card, call, prompt_tokens)
    return 2 * part.layers * part.cached_heads * part.card.head_dim * part.itemsize * slots * length


def sequence_tokens(card: Card, call: Call, prompt_tokens: int) -> int:
    """The longest sequence that a call may see, in tokens: the longest prompt, and its response."""
    new = call.sampling.max_new_tokens if call.sampling else 0
    return min(card.max_positions, prompt_tokens + new)


def in_flight(where: CallPlan, stage: int, samples: int) -> int:
    """Micro-batches whose activations a stage of a train call keeps at once.

    1F1B begins with as many forwards as there are stages from this one on; zero-bubble keeps what
    its delayed weight gradients need as long as the first stage would. There is at least a sample in each.
    It is the engine's own rule, said again because planning imports no torch; `tests/plan` compares them.
    """
    stages = where.layout.pp
    return min(samples, stages if where.schedule == "zero_bubble" else stages - stage)


def passing_bytes(graph: Graph, call: Call, where: CallPlan, part: Part) -> dict[str, int]:
    """Bytes of activations, logits and messages between stages on one rank while a call runs.

    A training token keeps, for each layer, its residual, two norms, q, k, v and the attention's
    output, gate, up and their product (with `recompute` the residual alone, and all of one layer);
    inference and prefill hold one layer at a time. Decoding has a row of logits for each slot.
    """
    card, item = part.card, part.itemsize
    generate = next((other for other in graph.calls if other.op == "generate"), call)
    longest = sequence_tokens(card, generate, graph.data.prompt_tokens)
    samples = -(-graph.prompts * graph.samples // (where.layout.dp * call.minibatches))
    tokens = min(max(where.micro_batch_tokens, longest), samples * longest)
    between = card.hidden // (part.holding.parts if where.sequence_parallel else 1)
    attention = (2 * part.query_heads + 2 * part.kv_heads) * card.head_dim
    layer = 4 * between + attention + 3 * part.intermediate
    if call.op != "train":
        kept = layer
    elif where.recompute:
        kept = in_flight(where, part.holding.pp, samples) * part.layers * between + layer
    else:
        kept = in_flight(where, part.holding.pp, samples) * part.layers * layer
    rows = min(where.slots, samples) if call.op == "generate" else min(LOGIT_ROWS, tokens)
    # The scores and, in training, their gradient.
    logits = rows * part.logits * max(4, item) * (2 if call.op == "train" else 1)
    neighbours = (part.holding.pp > 0) + (part.holding.pp < part.holding.stages - 1)
    messages = 0 if call.op == "generate" else neighbours * MESSAGES * tokens * between * item
    return {"activations": tokens * kept * item, "logits": logits, "messages": messages}
