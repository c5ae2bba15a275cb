"""What passes through a model's part while a call runs: activations, logits, messages between stages. Pure.

The formulas follow the engines' own code, operation by operation: what autograd keeps of each layer, and
the buffers that the widest moments add. `tests/plan/test_memory_peaks.py` holds them against counted peaks.
"""

from __future__ import annotations

import math

from planner.loads import How, Load
from planner.sizes import Part
from realflow.graph.types import Call

MESSAGES = 4
"""Hidden states of a micro-batch under way between a stage and a neighbour: two there, two back."""

KEEP_BYTES = 256 << 20
"""Logits of a micro-batch are kept for the backward pass up to so many bytes, and else computed again."""

PRODUCT_ROWS = 256
"""Rows of one product of the head."""

BLOCK_ELEMENTS = 1 << 20
"""Logits that are worked on at once in float32."""

TOKEN_BYTES = 96
"""What the fields of a token take where it is computed: ids, positions, masks, log probabilities."""


def passing_bytes(call: Call, how: How, part: Part, load: Load, *, host: bool = True) -> dict[str, int]:
    """Bytes of activations, logits and messages on one rank while a call runs, at its widest moment.

    `host`: it computes on a CPU, where attention of short sequences has its scores in memory.
    """
    if call.op == "generate":
        return _generating(how, part, load, host)
    passing = _Passing(how, part, load, host)
    found = passing.training() if call.op == "train" else passing.inferring()
    neighbours = (not part.is_first) + (not part.is_last)
    states = MESSAGES * neighbours * passing.share * part.hidden * part.itemsize
    return {**found, "messages": states} if states else found


def in_flight(how: How, stage: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage of a train call keeps at once.

    1F1B begins with as many forwards as there are stages from this one on; zero-bubble keeps what
    its delayed weight gradients need as long as the first stage would.
    It is the engine's own rule, said again because planning imports no torch; `tests/plan` compares them.
    """
    stages = how.layout.pp
    return min(micro_batches, stages if how.schedule == "zero_bubble" else stages - stage)


class _Passing:
    """One micro-batch of packed sequences on one rank.

    `rows` are the distinct tokens, `share` those of them that the rank has between the blocks; `wide` are
    the bytes of a number in norms and in the loss.
    """

    def __init__(self, how: How, part: Part, load: Load, host: bool) -> None:
        self.how, self.part, self.load = how, part, load
        self.rows = load.distinct
        self.share = -(-load.distinct // part.parts) if how.sequence_parallel else load.distinct
        self.item, self.wide = part.itemsize, max(4, part.itemsize)
        self.pairs = load.pairs if host or part.dtype != "bfloat16" else 0
        self.fields = TOKEN_BYTES * (load.tokens + load.total)

    def training(self) -> dict[str, int]:
        """The widest of three moments: the loss of the last stage, the backward of its last norm, and that of
        its last layer, which recompute brings back before."""
        part = self.part
        alive = in_flight(self.how, part.stage, self.load.micro_batches)
        layer, inside = self._kept_layer(), 0
        if self.how.recompute:
            layer, inside = self._states, layer
        entering = self._states * (1 if part.is_last else 2) if part.stages > 1 else 0
        low = self._kept_low()
        if self.how.recompute:
            low, inside = 0, inside + low // part.layers
        kept = alive * (part.layers * layer + low + entering) + self.fields
        norm, logits = self._kept_norm(self.share) if part.is_last else 0, self._head(backward=True)
        backward = inside + self._backward()
        if part.is_last:
            backward = max(backward, norm + self._norm_backward())
        if norm + logits >= backward and logits:
            return _some(activations=kept + norm, logits=logits)
        return _some(activations=kept + backward)

    def inferring(self) -> dict[str, int]:
        """The widest moment of a layer, or of the head."""
        part, item = self.part, self.item
        columns = (3 if part.gated else 2) * part.intermediate
        if part.low:
            columns += 3 * max(part.intermediate, part.hidden)
        mlp = self.rows * (columns + part.hidden) * item
        norm = self.share * part.hidden * (self.item if part.norm == "layer" else 3 * self.wide)
        attention = self._attention_forward()
        layer = 4 * self._states + max(mlp, norm, attention)
        logits = self._head(backward=False)
        ends = 2 * self.load.tokens * part.hidden * item
        if logits and ends + logits > layer:
            return _some(activations=ends + self.fields, logits=logits)
        return _some(activations=layer + self.fields)

    @property
    def _states(self) -> int:
        return self.share * self.part.hidden * self.item

    def _kept_norm(self, rows: int, width: int | None = None) -> int:
        """What a norm over `width` columns keeps, without its result: its input in float32 (a float32
        model's own input), and that normalised; a layer norm its input alone."""
        columns = self.part.hidden if width is None else width
        if self.part.norm == "layer":
            return rows * (columns * self.item + 2 * self.wide)
        normalised = self.wide if self.part.norm == "gemma" else self.item
        return rows * (columns * (self.wide + normalised) + self.wide)

    def _kept_low(self) -> int:
        """What adapters keep of all layers: A x of each. (Their x other products keep as well.)"""
        low = self.part.low
        return low.layers * low.rank * self.rows * self.item if low else 0

    def _kept_layer(self) -> int:
        """What autograd keeps of a layer for its backward pass."""
        part, item = self.part, self.item
        norms = part.norms * self._kept_norm(self.share) + 2 * self.rows * part.hidden * item
        mlp = self.rows * (4 if part.gated else 2) * part.intermediate * item
        return norms + mlp + self._kept_attention()

    def _kept_attention(self) -> int:
        part, load, item = self.part, self.load, self.item
        queries, pairs = part.query_heads * part.head_dim, part.kv_heads * part.head_dim
        kernel = load.padded - (load.short if self.pairs else 0)  # rows whose result the kernel keeps
        kept = (load.padded * (queries + 2 * pairs) + kernel * queries) * item + kernel * part.query_heads * 4
        if kernel < load.padded or load.padded > self.rows:  # the result is gathered from that
            kept += self.rows * queries * item
        kept += self.pairs * part.query_heads * item
        if part.head_norms:
            kept += self._kept_norm(self.rows, queries + pairs)
        return kept

    def _attention_forward(self) -> int:
        """The most that attention needs at once without a backward pass."""
        part, item = self.part, self.item
        queries, pairs = part.query_heads * part.head_dim, part.kv_heads * part.head_dim
        vectors = self.load.padded * (2 * queries + 2 * pairs) + self.rows * (queries + 2 * pairs)
        return (vectors + 2 * self.pairs * part.query_heads) * item

    def _backward(self) -> int:
        """What the backward of a layer has beside what was kept, at its widest."""
        part, item = self.part, self.item
        mlp = (
            self.rows * (2 * part.intermediate + part.hidden) * item + part.intermediate * part.hidden * item
        )
        attention = self.load.padded * 2 * part.query_heads * part.head_dim * item
        attention += 2 * self.pairs * part.query_heads * item
        if part.low:  # what A and B make of the widest input and output, before they are added
            mlp += self.rows * 3 * max(part.intermediate, part.hidden) * item
        done = self.rows * (4 if part.gated else 2) * part.intermediate * item  # of the MLP, by then
        tied = part.vocab // part.parts * part.hidden * item if part.tied and part.logits else 0
        return max(mlp, attention - done, self._norm_backward() - done) + self._states + tied

    def _norm_backward(self) -> int:
        columns = 2 * self.item if self.part.norm == "layer" else 5 * self.wide
        return self.share * self.part.hidden * columns

    def _head(self, *, backward: bool) -> int:
        """Bytes of logits, and of what is there beside them, at the widest moment of the head."""
        rows, kept = self.load.scored, KEEP_BYTES // max(1, self.part.logits * self.item)
        if not self.part.logits:
            return 0
        if backward and self.load.most and rows > kept:  # fewer rows, which are kept, may need more
            return max(self._head_of(rows, backward), self._head_of(kept, backward))
        return self._head_of(rows, backward)

    def _head_of(self, rows: int, backward: bool) -> int:
        part, item = self.part, self.item
        block = min(rows, PRODUCT_ROWS, max(1, BLOCK_ELEMENTS // part.logits)) * part.logits * self.wide
        product = min(rows, PRODUCT_ROWS) * part.logits * item
        states = rows * part.hidden * item
        if not backward:
            return states + max(product + 2 * block, 2 * product + block)
        logits, table = rows * part.logits * item, part.logits * part.hidden
        if logits <= KEEP_BYTES:
            return logits + 2 * states + max(4 * block, block + table * item)
        loop = max(2 * product + block, product + max(4 * block, block + table * item))
        return 2 * states + table * self.wide + loop


def _generating(how: How, part: Part, load: Load, host: bool) -> dict[str, int]:
    """The widest of: an MLP, attention of the slots, attention of a prefilled prompt, drawing tokens."""
    item, wide, rows = part.itemsize, max(4, part.itemsize), load.tokens
    slots = -(-load.running // min(how.layout.pp, load.slots))
    hidden = 2 * rows * part.hidden * item
    queries, cached = part.query_heads * part.head_dim, part.cached_heads * part.head_dim
    mlp = rows * (3 if part.gated else 2) * part.intermediate * item
    if part.low:  # what adapters make, before it is added
        mlp += rows * 3 * max(part.intermediate, part.hidden) * item
    norm = 2 * rows * part.hidden * wide
    vectors = rows * (2 * queries + 4 * part.kv_heads * part.head_dim) * item
    copies = slots * load.reach * cached * 4 if host and part.dtype == "bfloat16" else 0
    scores = 2 * slots * load.reach * part.query_heads * wide + copies
    prompt = load.longest * 2 * queries * item
    attention = vectors + max(scores, prompt)
    drawing = slots * part.logits * (item + 2 * wide)
    inside = max(mlp, norm, attention)
    fields = TOKEN_BYTES * rows
    if drawing > inside:
        return _some(activations=hidden + fields, logits=drawing)
    return _some(activations=hidden + inside + fields)


def _some(**causes: int) -> dict[str, int]:
    return {cause: math.ceil(size) for cause, size in causes.items() if size > 0}
