"""Bytes that one call needs on a rank, by cause: what it holds between its runs, and what more while it runs.

    part = Parts(graph, cards).of(model, holding)          or decoder_part(decoder, dtype, layout, stage)
    load = worst_load(graph, call, how, longest, part.positions)
    call_bytes(graph, call, how, part, load) -> CallBytes(weights, own, active)

Arithmetic alone: tens of thousands of options a second. `planner.memory` adds up what calls share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.loads import How, Load
from planner.passing import passing_bytes
from planner.sizes import ALIGNMENT, Part
from realflow.graph.types import Call, Graph
from realflow.models.card import ITEMSIZE

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class CallBytes:
    """Bytes by cause (of `CAUSES`) that a call needs on a rank.

    `weights` are held all the time, and shared with calls of the model whose holding is equal; `own` is
    held all the time too, and shared with none: masters, moments and gradients, KV cache, what is in host
    memory where that is the device's. `active` comes and goes with the call. A call that lets go of its
    weights, or sends them to the host, has them there.
    """

    weights: int
    own: Sizes
    active: Sizes

    @property
    def static(self) -> Sizes:
        """All that is held while other calls run."""
        return {"weights": self.weights, **self.own} if self.weights else self.own

    @property
    def own_bytes(self) -> int:
        """What the call alone holds while others run, in bytes."""
        return sum(self.own.values())

    @property
    def active_bytes(self) -> int:
        """What more is there while the call runs, in bytes."""
        return sum(self.active.values())


def call_bytes(
    graph: Graph, call: Call, how: How, part: Part, load: Load, *, host: bool = False
) -> CallBytes:
    """What a call of a model needs on the rank that holds `part`, with `load` on its replica.

    `host`: the device's memory is the host's, so that what is offloaded stays in it.
    """
    average = graph.models[str(call.model)].average
    weights = part.weight_bytes + (part.stored * ITEMSIZE[average] if average else 0)
    held = training_bytes(part, how.layout.dp) if call.op == "train" else {}
    own: dict[str, int] = {}
    active = passing_bytes(call, how, part, load, host=host)
    cache = {"kv_cache": kv_bytes(part, load)} if call.op == "generate" else {}
    if how.after == "keep":
        return CallBytes(weights, {**held, **cache}, active)
    away = weights if how.after == "offload" else 0
    if how.after == "offload":
        away += sum(size for cause, size in held.items() if cause != "gradients")
    else:
        own.update(held)
        held = {}
    if host and away:
        # It comes back before the call runs, so that both are never there at once.
        own["offloaded"] = away
        active["offloaded"] = -away
    return CallBytes(0, own, {"weights": weights, **held, **cache, **active})


def training_bytes(part: Part, dp: int) -> dict[str, int]:
    """Masters, moments and gradients of a train call on one rank.

    They are float32, float64 for a float64 model; masters and moments are sharded over dp (ZeRO-1).
    Where the compute weights have that dtype too, they are the masters. Gradients lie in up to four
    regions (of tied, partial, whole and all other parameters; adapters have but partial and other ones),
    each a multiple of what dp divides.
    """
    size, unit = (8 if part.dtype == "float64" else 4), dp * ALIGNMENT
    regions = 1 + (part.parts > 1)
    if part.low is None:
        regions += (part.stages > 1 and part.tied) + (part.parts > 1)
    elements = -(-part.trained // unit) * unit + (regions - 1) * unit
    masters = {} if part.itemsize == size else {"masters": size * elements // dp}
    return {**masters, "optimizer": 2 * size * elements // dp, "gradients": size * elements}


def kv_bytes(part: Part, load: Load) -> int:
    """Bytes of a generate call's KV cache: keys and values of every slot at its full length, in the
    layers and heads of this part."""
    return 2 * part.layers * part.cached_heads * part.head_dim * part.itemsize * load.slots * load.room
