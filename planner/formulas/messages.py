"""What ranks of one replica send each other: sympy expressions of bytes.

Where a layer communicates is what the engine does (`realflow.models.tensor`): a sum over the tensor ranks
after attention and after the MLP, and in backward before both; with sequence parallelism each sum is a
reduce-scatter with an all-gather at the block's other end. Context ranks pass keys and values round a ring;
expert ranks send tokens to their experts and back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy as sp

from planner.formulas.parts import WIDE
from planner.formulas.symbols import D, H, b, c, h, k, n, r, t, u, y
from planner.formulas.values import Axis, Operation, Phase

ONE = sp.Integer(1)

DRAWN = (24, 16)
"""Bytes for each row and rank that drawing from a cut vocabulary gathers (top-k and top-p aside): largest
logit, mass and token; then the owner's token and its probability."""


@dataclass(frozen=True)
class Message:
    """`count` messages of `bytes` each (as in `Traffic`) over the ranks of an axis."""

    operation: Operation
    axis: Axis
    bytes: sp.Expr
    count: sp.Expr = ONE


def layer_messages(phase: Phase, *, sequence: bool, sparse: bool, skips: bool = False) -> tuple[Message, ...]:
    """Of one layer, over t, c and e ranks. `skips`: a forward that is computed again for backward leaves its
    last sum out (`parts.ends_in_product`)."""
    if phase == "recompute":
        forward = layer_messages("forward", sequence=sequence, sparse=sparse)
        last = "reduce_scatter" if sequence else "all_reduce"
        again = (
            replace(one, count=one.count - 1) if skips and (one.operation, one.axis) == (last, "t") else one
            for one in forward
        )
        return (*again, *layer_messages("backward", sequence=sequence, sparse=sparse))
    found = [*_sums(n * H * b, 2, sequence=sequence and phase != "decode")]
    keys = 2 * n * u * D
    if phase == "decode":
        # Each context rank has attended to its part of the cache: numerators, maxima and sums.
        found.append(Message("all_reduce", "c", n * h * (D + 2) * WIDE))
    else:
        found.append(Message("p2p", "c", keys * b, c - 1))
    if phase == "backward":
        found.append(Message("p2p", "c", keys * WIDE, c))
    if sparse:
        found.append(Message("all_to_all", "e", n * k * H * b, sp.Integer(2)))
    return tuple(found)


def ends_messages(phase: Phase, *, sequence: bool, lm: bool) -> dict[str, tuple[Message, ...]]:
    """Of embedding and head, over t ranks. (Backward computes no embedding or head again.)"""
    states = n * H * b
    if phase == "decode":
        drawn = tuple(Message("all_gather", "t", size * r * t) for size in DRAWN)
        return {"embedding": (Message("all_reduce", "t", states),), "head": drawn if lm else ()}
    gather, scatter = Message("all_gather", "t", states), Message("reduce_scatter", "t", states)
    if phase == "forward":
        sums = (Message("all_reduce", "t", r * WIDE), Message("all_reduce", "t", 3 * r * WIDE))
        return {
            "embedding": (scatter,) if sequence else (Message("all_reduce", "t", states),),
            "head": ((gather,) if sequence else ()) + (sums if lm else ()),
        }
    into = (scatter if sequence else Message("all_reduce", "t", states),) if lm else ()
    return {"embedding": (gather,) if sequence else (), "head": into}


def stage_message() -> Message:
    """Hidden states from a stage to the next, or their gradients back."""
    return Message("p2p", "p", y * H * b)


def _sums(size: sp.Expr, count: int, *, sequence: bool) -> tuple[Message, ...]:
    times = sp.Integer(count)
    if sequence:
        return (Message("all_gather", "t", size, times), Message("reduce_scatter", "t", size, times))
    return (Message("all_reduce", "t", size, times),)
