"""Which bytes must move when a model changes its layout, and who sends them. Pure: no torch.

A layout of tensors is `{name: TensorSpec}`: for each parameter its full shape and which rank holds
which boxes of it. `transfers(src, dst)` compares two of them. Every element that a destination
lacks arrives there exactly once, elements that it has are copied at home, and the work of sending
is spread evenly over the replicas that could do it (`realflow.realloc.balance`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from realflow.errors import InputError, Problem
from realflow.layout import Box, box_size, full_box, intersect
from realflow.realloc.balance import Demand, share

MIN_SPLIT_BYTES = 64 * 1024
"""A piece is not split between two senders if a part would be smaller: it would cost more than it saves."""


@dataclass(frozen=True)
class TensorSpec:
    """One parameter under a layout. `holders` lists `(rank, box)`; a rank may hold several boxes."""

    shape: tuple[int, ...]
    itemsize: int
    holders: tuple[tuple[int, Box], ...]


Tensors = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Transfer:
    """One box of one parameter that `destination` gets from `source` (the same rank: a local copy).

    The box lies inside one box of the source layout at `source` and inside one box of the
    destination layout at `destination`. A transfer with `hop` 1 is a relay: it sends from the source's
    storage under the DESTINATION layout what transfers with `hop` 0 brought there.
    """

    name: str
    box: Box
    source: int
    destination: int
    hop: int = 0

    @property
    def pair(self) -> tuple[int, int]:
        """Who sends to whom."""
        return self.source, self.destination


@dataclass(frozen=True)
class Schedule:
    """What moves. `transfers` go between ranks, `copies` stay on theirs; both in a fixed order.

    `lower_bound_bytes` counts, independently of the transfers, the bytes that destinations lack.
    `busiest_bound_bytes` is what the busiest sender must send at least, whatever the choice of
    replicas (among those in the destination's node where there are some).
    """

    transfers: tuple[Transfer, ...]
    copies: tuple[Transfer, ...]
    itemsizes: Mapping[str, int]
    lower_bound_bytes: int
    busiest_bound_bytes: int = 0

    def bytes_of(self, transfer: Transfer) -> int:
        """Payload bytes of one transfer."""
        return box_size(transfer.box) * self.itemsizes[transfer.name]

    @cached_property
    def bytes(self) -> int:
        """Bytes that move between ranks."""
        return sum(self.bytes_of(transfer) for transfer in self.transfers)

    @cached_property
    def sent_bytes(self) -> Mapping[int, int]:
        """Sender -> bytes; ranks that send nothing are left out."""
        sent: dict[int, int] = defaultdict(int)
        for transfer in self.transfers:
            sent[transfer.source] += self.bytes_of(transfer)
        return dict(sent)

    def part(self, rank: int) -> Schedule:
        """What one rank needs to know to do its share. The totals stay those of the whole."""
        return Schedule(
            transfers=tuple(t for t in self.transfers if rank in (t.source, t.destination)),
            copies=tuple(t for t in self.copies if t.source == rank),
            itemsizes=self.itemsizes,
            lower_bound_bytes=self.lower_bound_bytes,
            busiest_bound_bytes=self.busiest_bound_bytes,
        )


def replicated(
    shapes: Mapping[str, Sequence[int]], itemsize: int, ranks: Iterable[int]
) -> dict[str, TensorSpec]:
    """The specs of a layout `dN`: every rank of `ranks` holds every parameter whole."""
    everyone = tuple(ranks)
    return {
        name: TensorSpec(tuple(shape), itemsize, tuple((rank, full_box(shape)) for rank in everyone))
        for name, shape in shapes.items()
    }


def transfers(
    src: Tensors,
    dst: Tensors,
    topology: Mapping[int, str] | None = None,
    min_split_bytes: int = MIN_SPLIT_BYTES,
) -> Schedule:
    """The schedule that turns layout `src` into layout `dst`.

    `topology` maps a rank to its node; a destination is served from inside its node where a
    replica of what it lacks is there. The result depends on nothing but the arguments, so that
    every rank may compute it for itself. Raises InputError with every problem found: a parameter
    of `dst` that `src` lacks, another shape or item size, a box outside its tensor, boxes of one
    destination that overlap, elements that nobody holds, a rank without a node.
    """
    _check(src, dst, topology)
    copies: list[Transfer] = []
    demands: dict[tuple[int, ...], list[Demand]] = defaultdict(list)
    problems: list[Problem] = []
    for name, spec in dst.items():
        for rank, box, holders in _cells(src[name], spec):
            if not holders:
                message = f"rank {rank} needs box {box}, which no rank of the source layout holds"
                problems.append(Problem(message, where=name))
            elif rank in holders:
                copies.append(Transfer(name, box, rank, rank))
            else:
                senders = _near(holders, rank, topology)
                demands[senders].append(Demand(name, box, rank, spec.itemsize))
    if problems:
        raise InputError(problems)
    moved, bound = share(demands, min_split_bytes)
    return Schedule(
        transfers=tuple(Transfer(part.name, part.box, source, part.destination) for source, part in moved),
        copies=tuple(copies),
        itemsizes={name: spec.itemsize for name, spec in dst.items()},
        lower_bound_bytes=_missing_bytes(src, dst),
        busiest_bound_bytes=bound,
    )


def _near(holders: tuple[int, ...], rank: int, topology: Mapping[int, str] | None) -> tuple[int, ...]:
    """The holders in the rank's node, or all of them where there is none."""
    if topology is None:
        return holders
    return tuple(holder for holder in holders if topology[holder] == topology[rank]) or holders


def _cells(src: TensorSpec, dst: TensorSpec) -> Iterator[tuple[int, Box, tuple[int, ...]]]:
    """Cut every destination box so that each part lies inside or outside every source box.

    Yields `(destination rank, part, ranks that hold it)`. The cuts depend on the box alone, so
    replicas of a destination box share them.
    """
    by_box: dict[Box, list[int]] = defaultdict(list)
    for rank, box in src.holders:
        by_box[box].append(rank)
    known: dict[Box, list[tuple[Box, tuple[int, ...]]]] = {}
    for rank, box in dst.holders:
        if box_size(box) == 0:
            continue
        if box not in known:
            known[box] = _cut(box, by_box)
        for part, holders in known[box]:
            yield rank, part, holders


def _cut(box: Box, by_box: Mapping[Box, Sequence[int]]) -> list[tuple[Box, tuple[int, ...]]]:
    """The parts of `box`, each with the sorted ranks that hold it."""
    parts: list[tuple[Box, frozenset[int]]] = [(box, frozenset())]
    for source_box, ranks in by_box.items():
        if intersect(box, source_box) is None:
            continue
        cut: list[tuple[Box, frozenset[int]]] = []
        for part, holders in parts:
            common = intersect(part, source_box)
            if common is None:
                cut.append((part, holders))
                continue
            cut.append((common, holders.union(ranks)))
            cut.extend((rest, holders) for rest in subtract(part, common))
        parts = cut
    return [(part, tuple(sorted(holders))) for part, holders in parts]


def subtract(box: Box, hole: Box) -> list[Box]:
    """What is left of `box` without `hole` (which lies inside it): at most two boxes for each dim."""
    rest: list[Box] = []
    core = list(box)
    for dim, ((start, stop), (low, high)) in enumerate(zip(box, hole, strict=True)):
        if start < low:
            rest.append((*core[:dim], (start, low), *core[dim + 1 :]))
        if high < stop:
            rest.append((*core[:dim], (high, stop), *core[dim + 1 :]))
        core[dim] = (low, high)
    return rest


def _missing_bytes(src: Tensors, dst: Tensors) -> int:
    """Bytes that each destination needs and does not hold itself, counted box by box."""
    total = 0
    for name, spec in dst.items():
        own: dict[int, list[Box]] = defaultdict(list)
        for rank, box in src[name].holders:
            own[rank].append(box)
        for rank, box in spec.holders:
            missing = [box] if box_size(box) else []
            for held in own.get(rank, ()):
                missing = [rest for part in missing for rest in _without(part, held)]
            total += sum(map(box_size, missing)) * spec.itemsize
    return total


def _without(box: Box, other: Box) -> list[Box]:
    """What is left of `box` without the elements of `other`."""
    common = intersect(box, other)
    return [box] if common is None else subtract(box, common)


def _check(src: Tensors, dst: Tensors, topology: Mapping[int, str] | None) -> None:
    """Raise InputError unless the two layouts speak of the same tensors in boxes that make sense."""
    problems: list[Problem] = []
    for name, spec in dst.items():
        if name not in src:
            problems.append(Problem("the source layout has no such parameter", where=name))
            continue
        for what, found, expected in (
            ("shape", tuple(spec.shape), tuple(src[name].shape)),
            ("item size", spec.itemsize, src[name].itemsize),
        ):
            if found != expected:
                message = f"{what} {found} in the destination layout, {expected} in the source layout"
                problems.append(Problem(message, where=name))
    for side, specs in (("source", src), ("destination", dst)):
        for name, spec in specs.items():
            for rank, box in dict.fromkeys(spec.holders):
                inside = len(box) == len(spec.shape) and all(
                    0 <= start <= stop <= size for (start, stop), size in zip(box, spec.shape, strict=True)
                )
                if not inside:
                    message = f"box {box} of {side} rank {rank} leaves the shape {tuple(spec.shape)}"
                    problems.append(Problem(message, where=name))
    if topology is not None:
        ranks = {rank for specs in (src, dst) for spec in specs.values() for rank, _ in spec.holders}
        if unknown := sorted(ranks - topology.keys()):
            problems.append(Problem(f"the topology does not say on which node ranks {unknown} are"))
    if not problems:
        problems.extend(_overlaps(dst))
    if problems:
        raise InputError(problems)


def _overlaps(dst: Tensors) -> Iterator[Problem]:
    """Two boxes of one destination rank that share elements: they would be written twice."""
    for name, spec in dst.items():
        boxes: dict[int, list[Box]] = defaultdict(list)
        for rank, box in spec.holders:
            if box_size(box):
                boxes[rank].append(box)
        for rank, held in boxes.items():
            for one, other in combinations(held, 2):
                if intersect(one, other) is not None:
                    yield Problem(f"boxes {one} and {other} of destination rank {rank} overlap", where=name)
