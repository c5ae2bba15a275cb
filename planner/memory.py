"""Bytes of each rank, by cause: a first certificate, from the models' cards.

What stays: compute weights of every model on the rank, and for a trained one masters and Adam's
two moments (sharded over dp) and float32 gradients; KV caches of the generate calls. What comes
and goes, of the call that needs most of it: activations and logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from realflow.graph.types import Call, Graph
from realflow.models.card import ITEMSIZE, Card
from realflow.planfile import CallPlan, Plan

LOGIT_ROWS = 1024
"""Rows of logits that exist at once in training and inference."""


@dataclass(frozen=True)
class Assumptions:
    """What the graph does not say: the bytes of an idle worker process."""

    process_bytes: int = 600 << 20


def rank_memory(
    graph: Graph, calls: Mapping[str, CallPlan], cards: Mapping[str, Card], world: int, assume: Assumptions
) -> dict[int, dict[str, int]]:
    """Rank -> cause -> bytes at the worst moment; ranks that no call uses are left out.

    Causes are `process`, `weights`, `optimizer`, `gradients`, `kv_cache`, `activations`, `logits`;
    those of 0 bytes are left out.
    """
    memory = {}
    for rank in range(world):
        here = [call for call in graph.calls if rank in calls[call.name].ranks]
        if not here:
            continue
        worst = {"activations": 0, "logits": 0}
        stays = {"process": assume.process_bytes, "weights": 0, "optimizer": 0, "gradients": 0, "kv_cache": 0}
        for model in sorted({call.model for call in here if call.model}):
            stays["weights"] += cards[model].weight_bytes(graph.models[model].dtype)
        for call in here:
            if call.model is None:
                continue
            card, dtype = cards[call.model], graph.models[call.model].dtype
            if call.op == "train":
                optimizer, gradients = training_bytes(card, dtype, calls[call.name].layout.dp)
                stays["optimizer"] += optimizer
                stays["gradients"] += gradients
            if call.op == "generate":
                stays["kv_cache"] += kv_bytes(
                    card, dtype, call, calls[call.name].slots, graph.data.prompt_tokens
                )
            passing = passing_bytes(graph, call, calls[call.name], card, dtype)
            if sum(passing.values()) > sum(worst.values()):
                worst = passing
        memory[rank] = {cause: size for cause, size in {**stays, **worst}.items() if size}
    return memory


def overfull(plan: Plan) -> dict[tuple[int, int], list[int]]:
    """(bytes expected, bytes of the device) -> the ranks that are expected not to fit into memory."""
    limits = [node.memory_bytes for node in plan.cluster.nodes for _ in range(node.devices)]
    found: dict[tuple[int, int], list[int]] = {}
    for rank, causes in sorted(plan.memory.items()):
        limit, total = limits[rank], sum(causes.values())
        if limit is not None and total > limit:
            found.setdefault((total, limit), []).append(rank)
    return found


def training_bytes(card: Card, dtype: str, dp: int) -> tuple[int, int]:
    """Bytes of (masters and two moments, gradients) on one rank.

    They are float32, float64 for a float64 model; the first is sharded over dp (ZeRO-1).
    """
    size = 8 if dtype == "float64" else 4
    return -(-3 * size * card.size // dp), size * card.size


def kv_bytes(card: Card, dtype: str, call: Call, slots: int, prompt_tokens: int) -> int:
    """Bytes of a generate call's KV cache: keys and values of every slot at its full length."""
    length = sequence_tokens(card, call, prompt_tokens)
    return 2 * card.layers * card.kv_heads * card.head_dim * ITEMSIZE[dtype] * slots * length


def sequence_tokens(card: Card, call: Call, prompt_tokens: int) -> int:
    """The longest sequence that a call may see, in tokens: the longest prompt, and its response."""
    new = call.sampling.max_new_tokens if call.sampling else 0
    return min(card.max_positions, prompt_tokens + new)


def passing_bytes(graph: Graph, call: Call, plan: CallPlan, card: Card, dtype: str) -> dict[str, int]:
    """Bytes of activations and logits while a call runs.

    A training token keeps, for each layer, its residual, two norms, q, k, v and the attention's
    output, gate, up and their product; inference and prefill hold one layer at a time. Decoding
    has a row of logits for each slot.
    """
    item = ITEMSIZE[dtype]
    generate = next((other for other in graph.calls if other.op == "generate"), call)
    longest = sequence_tokens(card, generate, graph.data.prompt_tokens)
    samples = -(-graph.prompts * graph.samples // plan.layout.dp)
    tokens = min(max(plan.micro_batch_tokens, longest), samples * longest)
    attention = (2 * card.heads + 2 * card.kv_heads) * card.head_dim
    layer = (4 * card.hidden + attention + 3 * card.intermediate) * item
    layers = card.layers if call.op == "train" else 1
    rows = min(plan.slots, samples) if call.op == "generate" else min(LOGIT_ROWS, tokens)
    # The scores and, in training, their gradient.
    logits = rows * card.vocab * max(4, item) * (2 if call.op == "train" else 1)
    return {"activations": tokens * layers * layer, "logits": logits}
