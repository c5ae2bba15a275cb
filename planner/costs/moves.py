"""Seconds of moving a model's weights between two layouts: what the busiest rank sends or receives.

Counted on cells: each kind of tensor is cut where either layout cuts it, and whether a rank has, needs and
lacks a cell is a table. What comes to a rank, from where, and who shares the sending follow the rules of
`realflow.realloc`: bytes that some rank of a node holds come from inside it, what several ranks of a node
lack comes in once and is relayed, and all holders share in sending.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from planner.costs.stages import StageRun, stage_runs
from planner.decoder import Decoder
from planner.formulas import ends_elements, layer_elements
from planner.formulas.values import Cut
from planner.rates import Rates, Seconds
from realflow.layout import Layout, cut

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class MoveShape:
    """Two layouts and where they lie: the destination among the source's devices (`inside`), or beside
    them as far as `devices` (of the cluster; None: enough) have room."""

    source: Layout
    destination: Layout
    inside: bool
    per_node: int
    devices: int | None = None

    @property
    def starts(self) -> tuple[int, int]:
        """The first device of source and destination."""
        here, there = self.source.size, self.destination.size
        if self.inside or here == 0:
            return 0, 0
        start = -(-here // there) * there  # aligned to its own size
        if self.devices is not None and start + there > self.devices:
            return 0, 0  # they overlap: one lies in the other
        return 0, start


@dataclass(frozen=True)
class MoveLoads:
    """Elements of the busiest rank: sent or received inside its node and to others (the larger of the two
    directions), and copied at home; `total` is what moves."""

    inside: float
    between: float
    copied: float
    total: float


def move_loads(decoder: Decoder, shape: MoveShape) -> MoveLoads:
    """What a move puts on the busiest rank."""
    tables = _tables(decoder, shape.source.tp, shape.source.pp, shape.destination.tp, shape.destination.pp)
    nodes, times = _nodes(shape)  # ranks of nodes that are alike are looked at once
    have, need = tables.have[nodes[..., 0]], tables.need[nodes[..., 1]]  # [nodes, ranks, cells]
    sizes = tables.sizes
    lack = need & ~have
    near: Flags = np.any(have, axis=1)  # some rank of the node has it
    missing = lack.sum(axis=1, dtype=np.float64)  # ranks of the node that lack it
    owners = have.sum(axis=1, dtype=np.float64)
    entering = (missing > 0) & ~near
    # Between nodes: each node that lacks a cell takes it in once; its ranks that lack it share that.
    shared = np.where(entering, 1.0 / np.maximum(missing, 1.0), 0.0)
    demand = (times @ entering) / np.maximum(times @ owners, 1.0)
    # Inside: what a rank lacks and did not take in itself; sent by the node's holders, or by relays.
    asked = np.where(near, missing, np.maximum(missing - 1.0, 0.0))
    sends = asked / np.maximum(np.where(near, owners, missing), 1.0)
    senders = (near[:, np.newaxis, :] & have) | (~near[:, np.newaxis, :] & lack)
    inside = (_weighed(lack, (1.0 - shared) * sizes), _weighed(senders, sends * sizes))
    between = (_weighed(lack, shared * sizes), have @ (demand * sizes))
    return MoveLoads(
        inside=float(max(side.max() for side in inside)),
        between=float(max(side.max() for side in between)),
        copied=float((((need & have) @ sizes) * _differs(shape, nodes)).max()),
        total=float(times @ (lack @ sizes).sum(axis=1)),
    )


def _differs(shape: MoveShape, nodes: NDArray[np.int64]) -> Flags:
    """[nodes, ranks]: those that hold something else under the other layout; equal parts are shared."""
    alike = (shape.source.tp, shape.source.pp) == (shape.destination.tp, shape.destination.pp)
    found: Flags = (nodes[..., 0] != nodes[..., 1]) | (not alike)
    return found


def _weighed(flags: Flags, weights: Floats) -> Floats:
    """[nodes, ranks, cells] by [nodes, cells] -> [nodes, ranks]."""
    found: Floats = np.einsum("nrc,nc->nr", flags.astype(np.float64), weights)
    return found


def moved_seconds(rates: Rates, loads: MoveLoads, itemsize: int, *, averaged: bool = False) -> Seconds:
    """Seconds of a move, its way from the master and back included. A follower that is averaged reads and
    writes what it has, too."""
    found = rates.constant("dispatch")
    inside = rates.realloc(loads.inside * itemsize) if loads.inside else Seconds(0.0)
    between = rates.realloc(loads.between * itemsize, between=True) if loads.between else Seconds(0.0)
    found += inside if inside.value >= between.value else between
    if loads.copied or averaged:
        found += rates.copy(loads.copied * itemsize * (2 if averaged else 1))
    return found


def _layouts(shape: MoveShape) -> tuple[Layout, Layout]:
    return shape.source, shape.destination


def _nodes(shape: MoveShape) -> tuple[NDArray[np.int64], Floats]:
    """What the ranks of each kind of node hold, [nodes, ranks, 2], as rows of the tables (stage and tensor
    rank; the last row: nothing), and how many such nodes there are."""
    ranks = max(start + layout.size for start, layout in zip(shape.starts, _layouts(shape), strict=True))
    nodes = -(-ranks // shape.per_node)
    found = np.empty((nodes * shape.per_node, 2), dtype=np.int64)
    for side, (layout, start) in enumerate(zip(_layouts(shape), shape.starts, strict=True)):
        index = np.arange(layout.size)
        found[:, side] = layout.pp * layout.tp
        found[start : start + layout.size, side] = (
            index // (layout.dp * layout.tp) * layout.tp + index % layout.tp
        )
    kinds, times = np.unique(found.reshape(nodes, -1), axis=0, return_counts=True)
    return kinds.reshape(len(kinds), shape.per_node, 2), times.astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Tables:
    """Which cells the ranks of a stage and tensor rank have under the source layout, and need under the
    destination layout ([stages * tensor ranks + 1, cells], the last row empty); elements of each cell."""

    have: Flags
    need: Flags
    sizes: Floats


@lru_cache(maxsize=4096)
def _tables(decoder: Decoder, tp: int, pp: int, other_tp: int, other_pp: int) -> _Tables:
    columns: list[list[Flags]] = [[], []]
    sizes = []
    for part in _parts(decoder, pp, other_pp):
        edges = sorted(_edges(part, tp) | _edges(part, other_tp))
        sizes.append(np.diff(np.array(edges, dtype=np.float64)) / part.units * part.elements)
        for side, (parts, stages) in enumerate(((tp, pp), (other_tp, other_pp))):
            columns[side].append(_held(part, parts, stages, edges, side))
    have, need = (np.concatenate(side, axis=1) for side in columns)
    return _Tables(have, need, np.concatenate(sizes))


@dataclass(frozen=True)
class _Part:
    """Tensors that are cut alike: `elements` in `units` (heads, columns, token ids) that tensor ranks
    divide; `whole` where each has all. `stages` are those of source and destination that hold it."""

    elements: float
    units: int
    stages: tuple[tuple[int, ...], tuple[int, ...]]
    whole_from: int = 0
    """Tensor ranks from which on each has all: 0 never, 1 always, else where they do not divide it."""

    def is_whole(self, tp: int) -> bool:
        """Whether each of `tp` ranks holds all."""
        return tp > 1 and (self.whole_from == 1 or (self.whole_from == 2 and self.units % tp != 0))


def _edges(part: _Part, tp: int) -> set[int]:
    if part.is_whole(tp):
        return {0, part.units}
    return {0, part.units, *(cut(part.units, tp, index)[0] for index in range(min(tp, part.units)))}


def _held(part: _Part, tp: int, pp: int, edges: list[int], side: int) -> Flags:
    """[stages * tensor ranks + 1, cells] of a part: who holds what."""
    found = np.zeros((pp * tp + 1, len(edges) - 1), dtype=bool)
    lows, highs = np.array(edges[:-1]), np.array(edges[1:])
    for index in range(tp):
        low, high = (0, part.units) if part.is_whole(tp) else cut(part.units, tp, index)
        for stage in part.stages[side]:
            found[stage * tp + index] |= (lows >= low) & (highs <= high)
    return found


@lru_cache(maxsize=4096)
def _parts(decoder: Decoder, source: int, destination: int) -> tuple[_Part, ...]:
    """A decoder's tensors in parts that are cut alike under both numbers of stages."""
    runs = stage_runs(decoder, source), stage_runs(decoder, destination)
    bounds = sorted({run.first for side in runs for run in side} | {len(decoder.layers)})
    found = []
    for low, high in pairwise(bounds):
        stages = _stage_of(runs[0], low, high), _stage_of(runs[1], low, high)
        for kind, count in decoder.kinds(low, high).items():
            found += [
                _Part(size * count, units, stages, whole)
                for size, units, whole in _layer_parts(decoder, kind)
                if size
            ]
    ends = ends_elements(decoder, Cut())
    first, last = ((0,), (0,)), ((source - 1,), (destination - 1,))
    if decoder.tied and decoder.head == "lm":
        both = tuple(tuple({0, count - 1}) for count in (source, destination))
        found.append(_Part(ends["embedding"], decoder.vocab, (both[0], both[1])))
    else:
        found.append(_Part(ends["embedding"], decoder.vocab, first))
        whole = 0 if decoder.head == "lm" else 1
        found.append(_Part(ends["head"], decoder.vocab if decoder.head == "lm" else 1, last, whole))
    found.append(_Part(ends["final_norm"], 1, last, 1))
    return tuple(part for part in found if part.elements)


def _stage_of(runs: tuple[StageRun, ...], low: int, high: int) -> tuple[int, ...]:
    """The stage that has layers `[low, high)`."""
    return (next(i for i, run in enumerate(runs) if run.first <= low and high <= run.stop),)


def _layer_parts(decoder: Decoder, kind: int) -> tuple[tuple[float, int, int], ...]:
    """(elements, units, whole from) of one layer's query and output, key and value, MLP, and norms."""
    layer = decoder.layers[kind]
    query = 2.0 * decoder.hidden * decoder.heads * decoder.head_dim
    keys = 2.0 * decoder.hidden * decoder.kv_heads * decoder.head_dim
    if decoder.qkv_bias:
        query += decoder.heads * decoder.head_dim
        keys += 2.0 * decoder.kv_heads * decoder.head_dim
    products = 3.0 if decoder.gated else 2.0
    dense = products * decoder.hidden * layer.intermediate
    experts = products * decoder.hidden * layer.expert_columns * layer.experts
    shared = products * decoder.hidden * layer.shared_columns
    rest = layer_elements(decoder, kind, Cut()) - query - keys - dense - experts - shared
    return (
        (query, decoder.heads, 0),
        (keys, decoder.kv_heads, 2),
        (dense, layer.intermediate, 0),
        (experts, max(1, layer.expert_columns), 0),
        (shared, max(1, layer.shared_columns), 0),
        (max(0.0, rest), 1, 1),
    )
