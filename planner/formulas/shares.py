"""The symbols of a layout as numbers: what the busiest rank has of a layer. Imports no sympy."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from planner.decoder import Decoder
from planner.formulas.values import Cut
from realflow.layout import cut as run


class Shares(NamedTuple):
    """Values of `symbols.SHARES` without the first (bytes), in that order."""

    hidden: int
    head_dim: int
    heads: int
    held_kv_heads: int
    used_kv_heads: int
    columns: int
    shared_columns: int
    expert_columns: int
    experts: int
    held_experts: int
    active: int
    expert_ranks: int
    vocab: int


@lru_cache(maxsize=65536)
def shares(decoder: Decoder, kind: int, cut: Cut) -> Shares:
    """Of the busiest tensor rank, for a layer of this kind."""
    layer, t = decoder.layers[kind], cut.t
    return Shares(
        hidden=decoder.hidden,
        head_dim=decoder.head_dim,
        heads=-(-decoder.heads // t),
        held_kv_heads=decoder.kv_heads if decoder.kv_heads % t else decoder.kv_heads // t,
        used_kv_heads=used_kv_heads(decoder.heads, decoder.kv_heads, t),
        columns=-(-layer.intermediate // t),
        shared_columns=-(-layer.shared_columns // t),
        expert_columns=-(-layer.expert_columns // t),
        experts=max(1, layer.experts),
        held_experts=-(-layer.experts // cut.e),
        active=layer.active,
        expert_ranks=cut.e,
        vocab=-(-decoder.vocab // t),
    )


@lru_cache(maxsize=4096)
def used_kv_heads(heads: int, kv_heads: int, t: int) -> int:
    """Key and value heads that the query heads of a tensor rank read, on the rank that reads most.

    >>> used_kv_heads(9, 3, 2), used_kv_heads(32, 8, 16)
    (2, 1)
    """
    group = heads // kv_heads
    runs = (run(heads, t, index) for index in range(min(t, heads)))
    return max(-(-stop // group) - start // group for start, stop in runs)
