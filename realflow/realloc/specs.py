"""What a layout of tensors says, and whether two of them can be compared. Pure: no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from realflow.errors import InputError, Problem
from realflow.layout import Box, box_size, full_box, intersect

Holders = tuple[tuple[int, Box], ...]


@dataclass(frozen=True)
class TensorSpec:
    """One parameter under a layout: its full shape, the bytes of an element, and who holds what.

    `holders` lists `(rank, box)`; a rank may hold several boxes.
    """

    shape: tuple[int, ...]
    itemsize: int
    holders: Holders


Tensors = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Pattern:
    """Parameters that are cut alike in both layouts, so that what is found for one holds for all.

    `names` are their places in the destination layout, `itemsize` the bytes of an element on its way.
    """

    names: tuple[int, ...]
    itemsize: int
    src: Holders
    dst: Holders


def replicated(
    shapes: Mapping[str, Sequence[int]], itemsize: int, ranks: Iterable[int]
) -> dict[str, TensorSpec]:
    """The specs of a layout `dN`: every rank of `ranks` holds every parameter whole."""
    everyone = tuple(ranks)
    return {
        name: TensorSpec(tuple(shape), itemsize, tuple((rank, full_box(shape)) for rank in everyone))
        for name, shape in shapes.items()
    }


class _Numbers:
    """A number for each different tuple of holders; the same object is not compared again."""

    def __init__(self) -> None:
        self._by_value: dict[Holders, int] = {}
        self._by_id: dict[int, int] = {}

    def __call__(self, holders: Holders) -> int:
        number = self._by_id.get(id(holders))
        if number is None:
            number = self._by_value.setdefault(holders, len(self._by_value))
            self._by_id[id(holders)] = number
        return number


def patterns(src: Tensors, dst: Tensors) -> list[Pattern]:
    """The parameters of `dst` in groups that are cut alike."""
    number = _Numbers()
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    names = list(dst)
    for index, name in enumerate(names):
        there, here = src[name], dst[name]
        itemsize = min(there.itemsize, here.itemsize)
        groups[itemsize, number(there.holders), number(here.holders)].append(index)
    return [
        Pattern(tuple(found), itemsize, src[names[found[0]]].holders, dst[names[found[0]]].holders)
        for (itemsize, _, _), found in groups.items()
    ]


def check(src: Tensors, dst: Tensors, nodes: Mapping[int, str] | None) -> None:
    """Raise InputError unless the two layouts speak of the same tensors in boxes that make sense."""
    problems: list[Problem] = []
    for name, spec in dst.items():
        if name not in src:
            problems.append(Problem("the source layout has no such parameter", where=name))
        elif (found := tuple(spec.shape)) != (expected := tuple(src[name].shape)):
            message = f"shape {found} in the destination layout, {expected} in the source layout"
            problems.append(Problem(message, where=name))
    number = _Numbers()
    known: dict[tuple[tuple[int, ...], int], list[tuple[int, Box]]] = {}
    ranks: set[int] = set()
    for side, specs in (("source", src), ("destination", dst)):
        for name, spec in specs.items():
            key = (tuple(spec.shape), number(spec.holders))
            if key not in known:
                known[key] = list(_outside(*key[:1], spec.holders))
                ranks.update(rank for rank, _ in spec.holders)
            for rank, box in known[key]:
                problems.append(Problem(f"box {box} of {side} rank {rank} {_fault(box, spec)}", where=name))
    if nodes is not None and (unknown := sorted(ranks - nodes.keys())):
        problems.append(Problem(f"the topology does not say on which node ranks {unknown} are"))
    if not problems:
        problems.extend(_overlaps(dst, number))
    if problems:
        raise InputError(problems)


def _outside(shape: tuple[int, ...], holders: Holders) -> Iterator[tuple[int, Box]]:
    """The boxes that do not lie inside the shape."""
    good: set[Box] = set()
    for rank, box in dict.fromkeys(holders):
        if box in good:
            continue
        if len(box) == len(shape) and all(
            0 <= start <= stop <= size for (start, stop), size in zip(box, shape, strict=True)
        ):
            good.add(box)
        else:
            yield rank, box


def _fault(box: Box, spec: TensorSpec) -> str:
    if len(box) != (dims := len(spec.shape)):
        return f"has {len(box)} dim{'s' * (len(box) != 1)}, the shape {spec.shape} has {dims}"
    return f"leaves the shape {spec.shape}; expected 0 <= start <= stop <= size on every dim"


def _overlaps(dst: Tensors, number: _Numbers) -> Iterator[Problem]:
    """Two boxes of one destination rank that share elements: they would be written twice."""
    known: dict[int, list[tuple[int, Box, Box]]] = {}
    for name, spec in dst.items():
        key = number(spec.holders)
        if key not in known:
            known[key] = list(_overlapping(spec.holders))
        for rank, one, other in known[key]:
            yield Problem(f"boxes {one} and {other} of destination rank {rank} overlap", where=name)


def _overlapping(holders: Holders) -> Iterator[tuple[int, Box, Box]]:
    boxes: dict[int, list[Box]] = defaultdict(list)
    for rank, box in holders:
        boxes[rank].append(box)
    for rank, held in boxes.items():
        if len(held) > 1:
            for one, other in combinations([box for box in held if box_size(box)], 2):
                if intersect(one, other) is not None:
                    yield rank, one, other
