"""What a schedule must do, found without the code under test: masks on a grid, and a linear program.

The coordinates at which any box begins or ends cut a tensor into a grid. For each rank a mask says
which cells of the grid it holds, wants and is sent; everything else is arithmetic on these masks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ortools.linear_solver import pywraplp

from realflow.layout import Box
from realflow.realloc import Schedule, Tensors, TensorSpec, Transfer

Masks = npt.NDArray[np.bool_]
Signature = tuple[tuple[int, ...], tuple[int, ...]]
"""Ranks that hold a cell, ranks that lack it."""


@dataclass(frozen=True)
class Facts:
    """What must move, by the masks: bytes that ranks lack, bytes that must enter nodes, and the bytes of
    every combination of holders and lacking ranks."""

    lacking: int
    entering: int
    demand: Mapping[Signature, int]


class Grid:
    """A tensor cut at every coordinate at which one of the given boxes begins or ends."""

    def __init__(self, shape: tuple[int, ...], boxes: Iterable[Box]) -> None:
        edges = [{0, size} for size in shape]
        for box in boxes:
            for found, interval in zip(edges, box, strict=True):
                found.update(interval)
        self.edges = [np.array(sorted(found)) for found in edges]
        self.shape = tuple(len(found) - 1 for found in self.edges)
        self.weights = np.ones((), dtype=np.int64)
        for found in self.edges:
            self.weights = np.multiply.outer(self.weights, np.diff(found))

    def cells(self, box: Box) -> tuple[slice, ...]:
        """The cells of a box."""
        return tuple(
            slice(*np.searchsorted(found, interval).tolist())
            for found, interval in zip(self.edges, box, strict=True)
        )

    def masks(self, holders: Iterable[tuple[int, Box]], place: Mapping[int, int]) -> Masks:
        """One mask for each rank: the cells that it holds."""
        masks = np.zeros((len(place), *self.shape), dtype=bool)
        for rank, box in holders:
            masks[(place[rank], *self.cells(box))] = True
        return masks


def audit(src: Tensors, dst: Tensors, schedule: Schedule, nodes: Mapping[int, str] | None = None) -> Facts:
    """Assert that a schedule does what it must and no more; return what that is."""
    ranks = sorted({rank for specs in (src, dst) for spec in specs.values() for rank, _ in spec.holders})
    where = {rank: "one" if nodes is None else nodes[rank] for rank in ranks}
    moved: dict[str, list[Transfer]] = defaultdict(list)
    for transfer in (*schedule.transfers, *schedule.copies):
        moved[transfer.name].append(transfer)
    assert all(t.source != t.destination and t.hop in (0, 1) for t in schedule.transfers)
    assert all(t.source == t.destination and t.hop == 0 for t in schedule.copies)
    assert moved.keys() <= dst.keys()
    demand: dict[Signature, int] = defaultdict(int)
    for name, spec in dst.items():
        itemsize = min(spec.itemsize, src[name].itemsize)
        assert schedule.itemsizes[name] == itemsize
        for signature, elements in _audit_one(src[name], spec, moved[name], ranks, where).items():
            demand[signature] += elements * itemsize
    lacking = sum(size * len(lack) for (_, lack), size in demand.items())
    entering = sum(
        size * len({where[rank] for rank in lack} - {where[rank] for rank in hold})
        for (hold, lack), size in demand.items()
    )
    crossing = sum(
        schedule.bytes_of(t) for t in schedule.transfers if where[t.source] != where[t.destination]
    )
    assert schedule.bytes == schedule.lower_bound_bytes == lacking
    assert crossing == entering == sum(schedule.node_bytes.values())
    assert sum(schedule.sent_bytes.values()) == lacking
    return Facts(lacking, entering, dict(demand))


def _audit_one(
    src: TensorSpec, dst: TensorSpec, moved: list[Transfer], ranks: list[int], where: Mapping[int, str]
) -> dict[Signature, int]:
    """Check one parameter; elements by who holds and who lacks them."""
    place = {rank: index for index, rank in enumerate(ranks)}
    boxes = {box for spec in (src, dst) for _, box in spec.holders}
    grid = Grid(dst.shape, boxes | {t.box for t in moved})
    hold, want = grid.masks(src.holders, place), grid.masks(dst.holders, place)
    received, written = (np.zeros(hold.shape, dtype=np.int16) for _ in range(2))
    for transfer in sorted(moved, key=lambda t: t.hop):
        cells = grid.cells(transfer.box)
        read = (dst if transfer.hop else src).holders
        assert any(rank == transfer.source and _inside(transfer.box, box) for rank, box in read)
        assert any(r == transfer.destination and _inside(transfer.box, box) for r, box in dst.holders)
        here, there = place[transfer.source], place[transfer.destination]
        if transfer.hop:  # a relay sends what it received, inside its node
            assert (received[(here, *cells)] == 1).all()
            assert where[transfer.source] == where[transfer.destination]
        elif transfer.source != transfer.destination:
            received[(there, *cells)] += 1
        written[(there, *cells)] += 1
    assert (written == want).all()
    lack = want & ~hold
    found: dict[Signature, int] = defaultdict(int)
    columns = np.concatenate([hold, lack]).reshape(2 * len(ranks), -1)
    weights = grid.weights.reshape(-1)
    chosen = np.flatnonzero(lack.reshape(len(ranks), -1).any(axis=0))
    if len(chosen):
        different, which = np.unique(columns[:, chosen], axis=1, return_inverse=True)
        totals = np.bincount(which.reshape(-1), weights=weights[chosen])
        for column, total in zip(different.T, totals, strict=True):
            half = [tuple(ranks[i] for i in np.flatnonzero(part)) for part in np.split(column, 2)]
            found[half[0], half[1]] += round(total)
    return found


def _inside(inner: Box, outer: Box) -> bool:
    return all(low <= a and b <= high for (a, b), (low, high) in zip(inner, outer, strict=True))


def least_busiest(facts: Facts, nodes: Mapping[int, str] | None = None) -> float:
    """Bytes of the busiest sender under the best division: a linear program, solved by GLOP.

    Of every combination of holders and lacking ranks: where a node holds it, its holders serve it;
    into any other node any holder sends it once, and there those who lack it share out who gets it
    and passes it on to the rest.
    """
    solver = pywraplp.Solver.CreateSolver("GLOP")
    most = solver.NumVar(0, solver.infinity(), "most")
    sent: dict[int, list[pywraplp.Variable]] = defaultdict(list)
    scale = max(facts.demand.values(), default=1)

    def serve(senders: list[int], amount: float) -> None:
        if amount:
            shares = [solver.NumVar(0, solver.infinity(), "") for _ in senders]
            solver.Add(solver.Sum(shares) == amount / scale)
            for sender, share in zip(senders, shares, strict=True):
                sent[sender].append(share)

    totals: dict[tuple[int, ...], int] = defaultdict(int)
    for (hold, lack), size in facts.demand.items():
        by_node: dict[str, list[int]] = defaultdict(list)
        for rank in lack:
            by_node["" if nodes is None else nodes[rank]].append(rank)
        for node, group in by_node.items():
            inside = tuple(rank for rank in hold if nodes is None or nodes[rank] == node)
            if inside:
                totals[inside] += size * len(group)
            else:
                totals[hold] += size
                totals[tuple(group)] += size * (len(group) - 1)
    for senders, amount in totals.items():
        serve(list(senders), amount)
    for shares in sent.values():
        solver.Add(solver.Sum(shares) <= most)
    solver.Minimize(most)
    assert solver.Solve() == pywraplp.Solver.OPTIMAL
    return float(most.solution_value() * scale)


def assert_balanced(schedule: Schedule, facts: Facts, nodes: Mapping[int, str] | None, smallest: int) -> None:
    """The busiest sender is near the best, and the schedule's own bound is none that can be beaten."""
    best = least_busiest(facts, nodes)
    busiest = max(schedule.sent_bytes.values(), default=0)
    assert busiest <= 1.05 * best + smallest, (busiest, best, smallest)
    assert schedule.busiest_bound_bytes <= math.ceil(best * (1 + 1e-6))  # whole bytes are sent
    assert schedule.busiest_bound_bytes >= 0.99 * best
