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
    ranks = max(start + layout.size for start, layout in zip(shape.starts, _layouts(shape), strict=True))
    nodes = np.arange(ranks) // shape.per_node
    have, need, sizes = _tables(decoder, shape, ranks)
    lack = need & ~have
    starts = np.flatnonzero(np.diff(nodes, prepend=-1))
    near = np.logical_or.reduceat(have, starts, axis=0)  # some rank of the node has it
    missing = np.add.reduceat(lack.astype(np.float64), starts, axis=0)  # ranks of the node that lack it
    owners = np.add.reduceat(have.astype(np.float64), starts, axis=0)
    total_owners = owners.sum(axis=0)
    entering = (missing > 0) & ~near
    # Between nodes: each node that lacks a cell takes it in once; its ranks that lack it share that.
    shared = np.where(entering, 1.0 / np.maximum(missing, 1.0), 0.0)[nodes]
    taken = lack * shared
    demand = entering.sum(axis=0) / np.maximum(total_owners, 1.0)
    sent_out = have * demand
    # Inside: what a rank lacks and did not take in itself; sent by the node's holders, or by relays.
    received = lack * (1.0 - shared)
    serving = np.where(near, owners, missing)[nodes]
    relayed = np.where(near, missing, np.maximum(missing - 1.0, 0.0))[nodes]
    sends = np.where(near[nodes], have, lack) * relayed / np.maximum(serving, 1.0)
    return MoveLoads(
        inside=float(max((received @ sizes).max(), (sends @ sizes).max())),
        between=float(max((taken @ sizes).max(), (sent_out @ sizes).max())),
        copied=float(((need & have) @ sizes).max()),
        total=float((lack @ sizes).sum()),
    )


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


def _tables(decoder: Decoder, shape: MoveShape, ranks: int) -> tuple[Flags, Flags, Floats]:
    """Which ranks have and need each cell, and the elements of each."""
    have, need, sizes = [], [], []
    for part in _parts(decoder, shape.source.pp, shape.destination.pp):
        edges = sorted({e for layout in _layouts(shape) for e in _edges(part, layout.tp)})
        sizes.append(np.diff(np.array(edges, dtype=np.float64)) / part.units * part.elements)
        held = [
            _held(part, layout, start, ranks, edges, index)
            for index, (layout, start) in enumerate(zip(_layouts(shape), shape.starts, strict=True))
        ]
        have.append(held[0])
        need.append(held[1])
    return np.concatenate(have, axis=1), np.concatenate(need, axis=1), np.concatenate(sizes)


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


def _held(part: _Part, layout: Layout, start: int, ranks: int, edges: list[int], side: int) -> Flags:
    """[ranks, cells] of a part: who holds what under a layout."""
    found = np.zeros((ranks, len(edges) - 1), dtype=bool)
    lows, highs = np.array(edges[:-1]), np.array(edges[1:])
    block = layout.dp * layout.tp
    for tp in range(layout.tp):
        low, high = (0, part.units) if part.is_whole(layout.tp) else cut(part.units, layout.tp, tp)
        cells = (lows >= low) & (highs <= high)
        for stage in part.stages[side]:
            first = start + stage * block + tp
            found[first : first + block - tp : layout.tp] |= cells
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
