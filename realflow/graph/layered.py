"""A layered layout of a small directed graph: boxes in rows, edges between them, no crossings that
can be avoided. After Sugiyama, Tagawa and Toda (1981): rows by longest path, orders by barycenter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_SWEEPS = 12
_ROUNDS = 60
_BEND = 8.0  # width that a passing edge takes


@dataclass(frozen=True)
class Point:
    """Centre of a box, or a bend of an edge; `row` counts rows from the top."""

    x: float
    row: int


@dataclass(frozen=True)
class Layered:
    """Where boxes lie, and for each edge (by its place in `edges`) the points that it passes."""

    boxes: Mapping[str, Point]
    routes: tuple[tuple[Point, ...], ...]
    rows: int
    left: float
    right: float


def arrange(
    widths: Mapping[str, float],
    edges: Sequence[tuple[str, str]],
    label_widths: Sequence[float],
    gap: float,
) -> Layered:
    """Lay out an acyclic graph. Units are those of the widths.

    Boxes lie in even rows, edge labels in the odd rows between, each label a box of its own: so
    that nothing lies upon anything else. An edge over several rows bends around what is between.
    """
    rows = _rows(widths, edges)
    size: dict[str, float] = dict(widths)
    place = {name: 2 * row for name, row in rows.items()}
    links: list[tuple[str, str]] = []
    chains: list[list[str]] = []
    for index, (a, b) in enumerate(edges):
        chain = [a]
        for row in range(place[a] + 1, place[b]):
            name = f"{index} {row}"  # no call has a space in its name
            place[name] = row
            size[name] = label_widths[index] if row == _label_row(place[a], place[b]) else _BEND
            chain.append(name)
        chain.append(b)
        links += pairwise(chain)
        chains.append(chain)
    order = _order(place, links)
    x = _coordinates(order, links, size, gap)
    points = {name: Point(x[name], place[name]) for name in place}
    return Layered(
        {name: points[name] for name in widths},
        tuple(tuple(points[name] for name in chain) for chain in chains),
        max(place.values(), default=0) + 1,
        min((x[name] - size[name] / 2 for name in x), default=0.0),
        max((x[name] + size[name] / 2 for name in x), default=0.0),
    )


def _label_row(top: int, bottom: int) -> int:
    """The row of an edge's label: just under its source."""
    return min(top + 1, bottom - 1)


def _rows(nodes: Mapping[str, float], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Length of the longest path to each node."""
    rows = dict.fromkeys(nodes, 0)
    for _ in nodes:  # acyclic, so that this many rounds are enough
        for a, b in edges:
            rows[b] = max(rows[b], rows[a] + 1)
    return rows


def _order(place: Mapping[str, int], links: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Rows of names, ordered so that edges between neighbours cross little."""
    layers: list[list[str]] = [[] for _ in range(max(place.values(), default=-1) + 1)]
    for name, row in place.items():
        layers[row].append(name)
    up: dict[str, list[str]] = {name: [] for name in place}
    down: dict[str, list[str]] = {name: [] for name in place}
    for a, b in links:
        down[a].append(b)
        up[b].append(a)
    best, fewest = [list(layer) for layer in layers], _crossings(layers, down)
    for sweep in range(_SWEEPS):
        forward = sweep % 2 == 0
        near = up if forward else down
        for index in range(1, len(layers)) if forward else range(len(layers) - 2, -1, -1):
            other = {name: i for i, name in enumerate(layers[index - 1 if forward else index + 1])}
            here = {name: i for i, name in enumerate(layers[index])}
            layers[index].sort(key=lambda n, o=other, h=here: _mean([o[m] for m in near[n]], h[n]))  # type: ignore[misc]
        if (count := _crossings(layers, down)) < fewest:
            best, fewest = [list(layer) for layer in layers], count
    return best


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else float(default)


def _crossings(layers: Sequence[Sequence[str]], down: Mapping[str, Sequence[str]]) -> int:
    total = 0
    for upper, lower in pairwise(layers):
        place = {name: i for i, name in enumerate(lower)}
        pairs = [(i, place[b]) for i, a in enumerate(upper) for b in down[a]]
        total += sum((p[0] - q[0]) * (p[1] - q[1]) < 0 for i, p in enumerate(pairs) for q in pairs[:i])
    return total


def _coordinates(
    layers: Sequence[Sequence[str]], links: Sequence[tuple[str, str]], size: Mapping[str, float], gap: float
) -> dict[str, float]:
    """x of every name: each row keeps its order and distances while names are pulled to the mean of
    their neighbours. Bends of one long edge pull at each other most, which makes it straight."""
    near: dict[str, list[tuple[str, float]]] = {name: [] for layer in layers for name in layer}
    for a, b in links:
        pull = 1.0 + 3.0 * (" " in a) + 3.0 * (" " in b)
        near[a].append((b, pull))
        near[b].append((a, pull))
    weight = {name: sum(pull for _, pull in others) or 1.0 for name, others in near.items()}
    x: dict[str, float] = {}
    for layer in layers:
        at = -sum(size[name] + gap for name in layer) / 2
        for name in layer:
            x[name] = at + size[name] / 2
            at += size[name] + gap
    for sweep in range(_ROUNDS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wish = [sum(x[o] * p for o, p in near[n]) / weight[n] if near[n] else x[n] for n in layer]
            places = _spread(wish, [weight[name] for name in layer], [size[name] for name in layer], gap)
            x.update(zip(layer, places, strict=True))
    return x


def _spread(
    wish: Sequence[float], weights: Sequence[float], sizes: Sequence[float], gap: float
) -> list[float]:
    """Positions in order, apart by the sizes and the gap, with the least weighted sum of squared
    distances from the wishes (isotonic regression by pooling adjacent violators)."""
    offsets = [0.0]
    for a, b in pairwise(sizes):
        offsets.append(offsets[-1] + (a + b) / 2 + gap)
    blocks: list[tuple[float, float, int]] = []  # mean of a block, its weight, how many are in it
    for value, weight, offset in zip(wish, weights, offsets, strict=True):
        mean, heavy, count = value - offset, weight, 1
        while blocks and blocks[-1][0] > mean:
            before, other, many = blocks.pop()
            mean = (before * other + mean * heavy) / (other + heavy)
            heavy, count = heavy + other, count + many
        blocks.append((mean, heavy, count))
    flat = [mean for mean, _, count in blocks for _ in range(count)]
    return [mean + offset for mean, offset in zip(flat, offsets, strict=True)]
