"""Which bytes must move when a model changes its layout, and who sends them. Pure: no torch.

A layout of tensors is `{name: TensorSpec}`: for each parameter its full shape and which rank holds
which boxes of it. `transfers(src, dst, topology)` compares two of them. Every element that a
destination lacks arrives there exactly once, and elements that it has are copied at home. Between
nodes go as few bytes as can be: what some rank of a node holds is sent inside it, and what several
ranks of a node lack comes in once and is relayed. Given that, the work of sending and relaying is
spread over all ranks that could do it, so that the busiest has the least (`realflow.realloc.balance`).

Equal parameters cost nothing more: geometry is done once for all that are cut alike, and everything
that grows with the number of transfers is arithmetic on columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from realflow.errors import InputError, Problem
from realflow.layout import Box
from realflow.realloc.cells import Cell, cells, missing_elements
from realflow.realloc.given import uniform
from realflow.realloc.schedule import Moves, Rows, Schedule, joined, rows_of
from realflow.realloc.shares import Boxes, Demands, Line, share
from realflow.realloc.specs import Pattern, Tensors, check, patterns
from realflow.realloc.topology import Topology

MIN_SPLIT_BYTES = 64 * 1024
"""How finely senders are balanced: no piece is cut into parts of less than half of it."""


def transfers(
    src: Tensors,
    dst: Tensors,
    topology: Topology | Mapping[int, str] | None = None,
    min_split_bytes: int = MIN_SPLIT_BYTES,
) -> Schedule:
    """The schedule that turns layout `src` into layout `dst`.

    `topology` says on which node a rank is (None: all on one). The result depends on nothing but the
    arguments. Item sizes may differ where values are cast on the way: the smaller one travels.
    Shapes, holders and boxes may be any sequences. Raises InputError with every problem found: what is
    no layout at all, a parameter of `dst` that `src` lacks, another shape, a box outside its tensor,
    boxes of one destination that overlap, elements that nobody holds, a rank without a node.
    """
    nodes = topology.nodes if isinstance(topology, Topology) else topology
    if nodes is not None and not isinstance(nodes, Mapping):
        raise InputError(
            f"topology {nodes!r}: expected a Topology, or a mapping from ranks to names of nodes"
        )
    src, dst = uniform(("source", src), ("destination", dst))
    check(src, dst, nodes)
    names = list(dst)
    groups = patterns(src, dst)
    routes = _Routes(groups, names, nodes)
    itemsizes = np.zeros(len(names), dtype=np.int64)
    for group in groups:
        itemsizes[np.array(group.names)] = group.itemsize
    demands = routes.demands(itemsizes)
    found, bound = share(demands, max(1, min_split_bytes // 2))
    rows, copies = _in_order(found), _in_order(joined(routes.copies))
    moves = Moves(names, demands.boxes.all, rows)
    sizes = dict(zip(names, itemsizes.tolist(), strict=True))
    return Schedule(
        transfers=moves,
        copies=Moves(names, demands.boxes.all, copies),
        itemsizes=sizes,
        lower_bound_bytes=sum(
            missing_elements(group.src, group.dst) * group.itemsize * len(group.names) for group in groups
        ),
        busiest_bound_bytes=bound,
        node_bytes={} if nodes is None else _node_bytes(rows, moves.bytes(sizes), nodes),
    )


class _Routes:
    """Ways by which every part of every destination box can come: at home, inside its node, or into it."""

    def __init__(self, groups: list[Pattern], names: list[str], nodes: Mapping[int, str] | None) -> None:
        self.copies: list[Rows] = []
        self._boxes = Boxes()
        self._names = [np.array(group.names, dtype=np.int64) for group in groups]
        self._numbers: dict[tuple[int, ...], int] = {}
        self._direct: list[Line] = []
        self._relays: dict[tuple[int, ...], Line] = defaultdict(Line)
        self._nodes = nodes
        problems: list[Problem] = []
        for index, group in enumerate(groups):
            for cell in cells(group.src, group.dst):
                if cell.holders:
                    self._add(index, cell)
                    continue
                problems.extend(
                    _unheld(names[i], rank, cell.box) for i in group.names for rank in cell.wanted
                )
        if problems:
            raise InputError(problems)

    def demands(self, itemsizes: np.ndarray) -> Demands:
        """All that must be sent."""
        return Demands(
            self._names, itemsizes, self._boxes, list(self._numbers), self._direct, dict(self._relays)
        )

    def _class(self, senders: tuple[int, ...]) -> int:
        """The number of the class with these senders."""
        number = self._numbers.setdefault(senders, len(self._direct))
        if number == len(self._direct):
            self._direct.append(Line())
        return number

    def _add(self, index: int, cell: Cell) -> None:
        """Sort one cell's destinations by where the cell can come from."""
        box = self._boxes.number(cell.box)
        holders = set(cell.holders)
        lacking: dict[str, list[int]] = defaultdict(list)
        for rank in cell.wanted:
            if rank in holders:
                names = self._names[index]
                self.copies.append(rows_of(names, np.full(len(names), box), rank, rank))
            else:
                lacking["" if self._nodes is None else self._nodes[rank]].append(rank)
        if not lacking:
            return
        near: dict[str, list[int]] = defaultdict(list)
        for rank in cell.holders:
            near["" if self._nodes is None else self._nodes[rank]].append(rank)
        for node, ranks in lacking.items():
            number = self._class(tuple(near[node]) if node in near else cell.holders)
            if node in near or len(ranks) == 1:
                for rank in ranks:
                    self._direct[number].add(index, box, rank)
            else:
                self._relays[tuple(ranks)].add(index, box, number)


def _unheld(name: str, rank: int, box: Box) -> Problem:
    return Problem(f"rank {rank} needs box {box}, which no rank of the source layout holds", where=name)


def _in_order(rows: Rows) -> Rows:
    """Rows by hop, source, destination, parameter and box: parameters follow the destination layout."""
    return rows.take(np.lexsort((rows.box, rows.name, rows.destination, rows.source, rows.hop)))


def _node_bytes(rows: Rows, sizes: np.ndarray, nodes: Mapping[int, str]) -> dict[tuple[str, str], int]:
    """Bytes by (node of the source, node of the destination), where these are two."""
    ranks, places = np.unique(np.concatenate([rows.source, rows.destination]), return_inverse=True)
    count = max(len(ranks), 1)
    pairs, which = np.unique(places[: len(sizes)] * count + places[len(sizes) :], return_inverse=True)
    totals = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(totals, which, sizes)
    found: dict[tuple[str, str], int] = defaultdict(int)
    for pair, total in zip(pairs.tolist(), totals.tolist(), strict=True):
        here, there = nodes[int(ranks[pair // count])], nodes[int(ranks[pair % count])]
        if here != there:
            found[here, there] += total
    return dict(found)
