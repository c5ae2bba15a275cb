"""A schedule: which boxes move between which ranks, kept in columns. Pure: no torch.

The schedule of a large cluster has millions of transfers, of which each rank needs a few thousand.
They are stored as columns of numbers and become `Transfer` values where somebody looks at them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, repeat
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from realflow.errors import InputError
from realflow.layout import Box, box_size

Ints = npt.NDArray[np.int64]
One = TypeVar("One", str, int)


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
class Rows:
    """Columns of equal length: indices of a name and of a box, two ranks, the hop. int64 each."""

    name: Ints
    box: Ints
    source: Ints
    destination: Ints
    hop: Ints

    def take(self, chosen: Ints) -> Rows:
        """The rows at these indices."""
        return Rows(*(column[chosen] for column in self.columns))

    @property
    def columns(self) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """The columns in the order of a Transfer's fields."""
        return self.name, self.box, self.source, self.destination, self.hop


class Moves(Sequence[Transfer]):
    """A sequence of transfers, stored in columns; equal to any sequence of equal transfers."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, names: Sequence[str], boxes: Sequence[Box], rows: Rows) -> None:
        self.names = names
        self.boxes = boxes
        self.rows = rows

    @classmethod
    def of(cls, transfers: Iterable[Transfer]) -> Moves:
        """The columns of given transfers."""
        names: dict[str, int] = {}
        boxes: dict[Box, int] = {}
        table = [
            (
                names.setdefault(t.name, len(names)),
                boxes.setdefault(t.box, len(boxes)),
                t.source,
                t.destination,
                t.hop,
            )
            for t in transfers
        ]
        columns = np.array(table, dtype=np.int64).reshape(len(table), 5)
        return cls(list(names), list(boxes), Rows(*columns.T))

    def __len__(self) -> int:
        return len(self.rows.name)

    @overload
    def __getitem__(self, index: int) -> Transfer: ...
    @overload
    def __getitem__(self, index: slice) -> Moves: ...
    def __getitem__(self, index: int | slice) -> Transfer | Moves:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        name, box, source, destination, hop = (int(column[index]) for column in self.rows.columns)
        return Transfer(self.names[name], self.boxes[box], source, destination, hop)

    def __iter__(self) -> Iterator[Transfer]:
        columns = (column.tolist() for column in self.rows.columns)
        for name, box, source, destination, hop in zip(*columns, strict=True):
            yield Transfer(self.names[name], self.boxes[box], source, destination, hop)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"Moves({list(self)!r})"

    def take(self, chosen: Ints) -> Moves:
        """The transfers at these indices, in their order."""
        return Moves(self.names, self.boxes, self.rows.take(chosen))

    def bytes(self, itemsizes: Mapping[str, int]) -> Ints:
        """Payload bytes of each transfer."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        used_boxes, box = np.unique(self.rows.box, return_inverse=True)
        used_names, name = np.unique(self.rows.name, return_inverse=True)
        elements = np.array([box_size(self.boxes[i]) for i in used_boxes.tolist()], dtype=np.int64)
        sizes = np.array([itemsizes[self.names[i]] for i in used_names.tolist()], dtype=np.int64)
        return elements[box] * sizes[name]


@dataclass(frozen=True)
class Schedule:
    """What moves. `transfers` go between ranks, `copies` stay on theirs; both in a fixed order.

    The two are given as any sequence and kept as `Moves`. `itemsizes` are the bytes of an element on
    its way: the destination's, unless the source's are fewer. `lower_bound_bytes` counts,
    independently of the transfers, the bytes that destinations lack. No choice of senders, with as
    few bytes between nodes, has a busiest sender of less than `busiest_bound_bytes`, a whole number; the
    busiest here has at most 1.05 times as many and the smallest piece that a sender can be relieved of.
    That is `min_split_bytes`, but never less than one element, and one that is relayed counts once for
    each rank it is relayed to: where pieces of a few bytes are allowed, that may be more. `node_bytes`
    are the bytes that leave one node for another, by (from, to).
    """

    transfers: Sequence[Transfer]
    copies: Sequence[Transfer]
    itemsizes: Mapping[str, int]
    lower_bound_bytes: int
    busiest_bound_bytes: int = 0
    node_bytes: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("transfers", "copies"):
            given = getattr(self, name)
            if not isinstance(given, Moves):
                object.__setattr__(self, name, Moves.of(given))

    @property
    def moves(self) -> Moves:
        """The transfers, as columns."""
        assert isinstance(self.transfers, Moves)
        return self.transfers

    @property
    def local(self) -> Moves:
        """The copies, as columns."""
        assert isinstance(self.copies, Moves)
        return self.copies

    def bytes_of(self, transfer: Transfer) -> int:
        """Payload bytes of one transfer."""
        return box_size(transfer.box) * self.itemsizes[transfer.name]

    @cached_property
    def bytes(self) -> int:
        """Bytes that move between ranks."""
        return int(self.moves.bytes(self.itemsizes).sum())

    @cached_property
    def sent_bytes(self) -> Mapping[int, int]:
        """Sender -> bytes, relayed ones included; ranks that send nothing are left out."""
        sent: dict[int, int] = defaultdict(int)
        sizes = self.moves.bytes(self.itemsizes)
        for source, size in zip(self.moves.rows.source.tolist(), sizes.tolist(), strict=True):
            sent[source] += size
        return dict(sent)

    def part(self, rank: int) -> Schedule:
        """What one rank needs to know to do its share. The bounds stay those of the whole; `node_bytes` is
        left out, which would outweigh the rest."""
        rows = self.moves.rows
        mine = self.moves.take(np.flatnonzero((rows.source == rank) | (rows.destination == rank)))
        kept = self.local.take(np.flatnonzero(self.local.rows.source == rank))
        names = {mine.names[i] for i in np.unique(mine.rows.name).tolist()}
        names.update(kept.names[i] for i in np.unique(kept.rows.name).tolist())
        return Schedule(
            transfers=mine,
            copies=kept,
            itemsizes={name: self.itemsizes[name] for name in sorted(names)},
            lower_bound_bytes=self.lower_bound_bytes,
            busiest_bound_bytes=self.busiest_bound_bytes,
        )


def to_wire(part: Schedule) -> dict[str, Any]:
    """A schedule as lists, whole numbers and strings, fit for msgpack; names and boxes occur once."""
    names = sorted(part.itemsizes)
    number = {name: index for index, name in enumerate(names)}
    boxes: dict[Box, int] = {}
    tables = []
    for moves in (part.moves, part.local):
        renamed = {old: number[moves.names[old]] for old in np.unique(moves.rows.name).tolist()}
        reboxed = {
            old: boxes.setdefault(moves.boxes[old], len(boxes)) for old in np.unique(moves.rows.box).tolist()
        }
        rows = moves.rows
        tables.append(
            [
                [renamed[old] for old in rows.name.tolist()],
                [reboxed[old] for old in rows.box.tolist()],
                rows.source.tolist(),
                rows.destination.tolist(),
                rows.hop.tolist(),
            ]
        )
    return {
        "names": names,
        "itemsizes": [part.itemsizes[name] for name in names],
        "boxes": [list(chain.from_iterable(box)) for box in boxes],
        "transfers": tables[0],
        "copies": tables[1],
        "lower_bound_bytes": part.lower_bound_bytes,
        "busiest_bound_bytes": part.busiest_bound_bytes,
        "node_bytes": [[*pair, size] for pair, size in sorted(part.node_bytes.items())],
    }


def from_wire(content: Mapping[str, Any]) -> Schedule:
    """The schedule that `to_wire` wrote. Raises InputError for anything else."""
    try:
        names = [_checked(name, str) for name in content["names"]]
        boxes: list[Box] = [
            tuple(zip(flat[::2], flat[1::2], strict=True))
            for flat in ([_checked(edge, int) for edge in found] for found in content["boxes"])
        ]
        moves = [_moves(names, boxes, content[key]) for key in ("transfers", "copies")]
        return Schedule(
            transfers=moves[0],
            copies=moves[1],
            itemsizes=dict(zip(names, (_checked(size, int) for size in content["itemsizes"]), strict=True)),
            lower_bound_bytes=_checked(content["lower_bound_bytes"], int),
            busiest_bound_bytes=_checked(content["busiest_bound_bytes"], int),
            node_bytes={
                (_checked(one, str), _checked(other, str)): _checked(size, int)
                for one, other, size in content["node_bytes"]
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"this is not a schedule as to_wire writes it: {error}") from error


def _checked(value: Any, kind: type[One]) -> One:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value


def _moves(names: Sequence[str], boxes: Sequence[Box], table: Sequence[Sequence[int]]) -> Moves:
    columns = [np.array([_checked(number, int) for number in column], dtype=np.int64) for column in table]
    if len(columns) != 5 or len({len(column) for column in columns}) != 1:
        raise ValueError("a table of transfers must have 5 columns of equal length")
    for column, size in zip(columns, (len(names), len(boxes)), strict=False):
        if len(column) and not 0 <= column.min() <= column.max() < size:
            raise ValueError(f"an index leaves its {size} entries")
    return Moves(names, boxes, Rows(*columns))


def rows_of(name: Ints, box: Ints, source: Ints | int, destination: Ints | int, hop: int = 0) -> Rows:
    """Rows whose ranks and hop may be one for all."""
    count = len(name)
    source, destination = (
        np.full(count, one, dtype=np.int64) if isinstance(one, int) else one for one in (source, destination)
    )
    return Rows(name, box, source, destination, np.full(count, hop, dtype=np.int64))


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows one after the other."""
    empty = np.zeros(0, dtype=np.int64)
    columns = zip(*(part.columns for part in parts), strict=True) if parts else repeat((empty,), 5)
    return Rows(*(np.concatenate(column) for column in columns))
