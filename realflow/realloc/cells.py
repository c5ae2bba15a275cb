"""Geometry of a reallocation: which parts of a tensor are held by whom and wanted by whom. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from realflow.layout import Box, box_size, flat_boxes, without
from realflow.realloc.specs import Holders


@dataclass(frozen=True)
class Cell:
    """A part of a tensor that lies inside or outside every box of both layouts.

    `holders` are the ranks that hold it under the source layout, `wanted` those that must hold it
    under the destination layout; both sorted.
    """

    box: Box
    holders: tuple[int, ...]
    wanted: tuple[int, ...]


def cells(src: Holders, dst: Holders) -> list[Cell]:
    """What the destination wants, cut at the edges of all boxes that meet."""
    ranks_of: list[dict[Box, list[int]]] = []
    for holders in (dst, src):
        by_box: dict[Box, list[int]] = defaultdict(list)
        for rank, box in holders:
            by_box[box].append(rank)
        ranks_of.append({box: ranks for box, ranks in by_box.items() if box_size(box)})
    wanting, holding = ranks_of
    boxes = [*wanting, *holding]
    ranks = [*wanting.values(), *holding.values()]
    if not wanting:
        return []
    found = []
    unions: dict[tuple[int, ...], tuple[int, ...]] = {}
    for box, cover in _sweep(boxes, tuple(range(len(boxes))), 0, len(wanting)):
        split = sum(index < len(wanting) for index in cover)
        union = []
        for indices in (cover[split:], cover[:split]):
            if indices not in unions:
                unions[indices] = tuple(sorted({rank for index in indices for rank in ranks[index]}))
            union.append(unions[indices])
        found.append(Cell(box, union[0], union[1]))
    return found


def _sweep(
    boxes: Sequence[Box], active: tuple[int, ...], dim: int, wanting: int
) -> Iterator[tuple[Box, tuple[int, ...]]]:
    """Disjoint parts of `boxes[i] for i in active`, from `dim` on, each with the boxes that cover it.

    The first `wanting` boxes are those of the destination; parts outside of them are left out. Along
    a dim, a new interval begins where a box begins or ends; inside it only the boxes that are open
    matter for the dims that follow.
    """
    if dim == len(boxes[active[0]]):
        yield (), active
        return
    opening: dict[int, list[int]] = defaultdict(list)
    closing: dict[int, list[int]] = defaultdict(list)
    for index in active:
        start, stop = boxes[index][dim]
        opening[start].append(index)
        closing[stop].append(index)
    edges = sorted(opening.keys() | closing.keys())
    current: set[int] = set()
    for low, high in pairwise(edges):
        current.difference_update(closing.get(low, ()))
        current.update(opening.get(low, ()))
        if not current:
            continue
        chosen = tuple(sorted(current))
        if chosen[0] < wanting:
            for rest, cover in _sweep(boxes, chosen, dim + 1, wanting):
                yield ((low, high), *rest), cover


def range_boxes(box: Box, start: int, stop: int) -> list[Box]:
    """The boxes that cover elements `[start, stop)` of a box, counted in row-major order."""
    inner = flat_boxes([high - low for low, high in box], start, stop)
    return [tuple((low + a, low + b) for (low, _), (a, b) in zip(box, part, strict=True)) for part in inner]


def missing_elements(src: Holders, dst: Holders) -> int:
    """Elements that destinations need and do not hold themselves, counted box by box.

    Nothing here is shared with `cells`: this is the yardstick for what the schedule moves.
    """
    own: dict[int, list[Box]] = defaultdict(list)
    for rank, box in src:
        own[rank].append(box)
    known: dict[tuple[Box, tuple[Box, ...]], int] = {}
    total = 0
    for rank, box in dst:
        key = (box, tuple(own.get(rank, ())))
        if key not in known:
            known[key] = sum(map(box_size, without(box, key[1])))
        total += known[key]
    return total
