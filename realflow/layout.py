"""Who holds what: device meshes, layouts and boxes. Pure values and arithmetic.

A `Layout` is a shape such as `d2t2p1`. A `DeviceMesh` is a layout on named ranks, ordered pp
outermost, then dp, then tp, so that a tensor group stays inside a node. A `Box` is a half-open
interval on each dim of a full tensor; every split of a tensor is written in boxes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from realflow.errors import InputError

AXES = ("pp", "dp", "tp")
SETS = ("replica", "ends", "all")
_LETTERS = {"d": "dp", "t": "tp", "p": "pp"}
_RESERVED = {"c": "context", "e": "expert"}

Box = tuple[tuple[int, int], ...]
"""One `(start, stop)` for each dim of the full tensor; `()` is the box of a scalar."""


@dataclass(frozen=True, order=True)
class Layout:
    """A data × tensor × pipeline shape. `str(Layout(2, 2, 1)) == "d2t2p1"`."""

    dp: int = 1
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for letter, axis in _LETTERS.items():
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"layout: {letter} must be a whole number of at least 1, not {size!r}")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read `d2`, `d2t2`, `t2d2p1`, ...; a missing letter is 1.

        Raises InputError for anything else, `c` (context) and `e` (expert) being reserved.
        """
        sizes: dict[str, int] = {}
        if not isinstance(text, str) or not re.fullmatch(r"(?:[a-z]\d+)+", text):
            raise InputError(f"layout {text!r}: expected letters with sizes, such as d2t1p1")
        for letter, digits in re.findall(r"([a-z])(\d+)", text):
            if letter in _RESERVED:
                raise InputError(
                    f"layout {text!r}: {letter} ({_RESERVED[letter]} parallel) is reserved and cannot run yet"
                )
            if letter not in _LETTERS:
                raise InputError(f"layout {text!r}: unknown letter {letter!r}; expected d, t or p")
            axis = _LETTERS[letter]
            if axis in sizes:
                raise InputError(f"layout {text!r}: {letter} is given twice")
            if len(digits) > 6 or int(digits) < 1:
                raise InputError(f"layout {text!r}: the size of {letter} must be from 1 to 999999")
            sizes[axis] = int(digits)
        return cls(**sizes)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        return f"d{self.dp}t{self.tp}p{self.pp}"


@dataclass(frozen=True)
class DeviceMesh:
    """Ranks arranged on the axes of a layout; `ranks[i]` sits at `coordinate(i)`."""

    ranks: tuple[int, ...]
    layout: Layout

    def __post_init__(self) -> None:
        if len(self.ranks) != self.layout.size:
            raise InputError(
                f"layout {self.layout} needs {self.layout.size} ranks, but {len(self.ranks)} are given: "
                f"{list(self.ranks)}"
            )
        if len(set(self.ranks)) != len(self.ranks):
            raise InputError(f"ranks {list(self.ranks)} name a rank twice")

    def coordinate(self, rank: int) -> dict[str, int]:
        """Place of a global rank: `{"pp": .., "dp": .., "tp": ..}`."""
        index = self.ranks.index(rank)
        rest, tp = divmod(index, self.layout.tp)
        pp, dp = divmod(rest, self.layout.dp)
        return {"pp": pp, "dp": dp, "tp": tp}

    def rank_at(self, *, pp: int = 0, dp: int = 0, tp: int = 0) -> int:
        """The global rank at a coordinate."""
        return self.ranks[(pp * self.layout.dp + dp) * self.layout.tp + tp]

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups of ranks along `axis`, each in mesh order.

        For an axis of `AXES` the ranks that differ only there; `replica`: all ranks of one
        data-parallel replica (pp and tp); `ends`: first and last stage of each pipeline; `all`: the
        whole mesh.
        """
        assert axis in (*AXES, *SETS), axis
        along = {"replica": ("pp", "tp"), "ends": ("pp",), "all": AXES}.get(axis, (axis,))
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in self.ranks:
            coordinate = self.coordinate(rank)
            if axis == "ends" and coordinate["pp"] not in (0, self.layout.pp - 1):
                continue
            key = tuple(coordinate[a] for a in AXES if a not in along)
            found.setdefault(key, []).append(rank)
        return tuple(tuple(group) for group in found.values())


def cut(total: int, parts: int, index: int) -> tuple[int, int]:
    """The `index`-th of `parts` intervals of `range(total)`, as even as can be, none skipped.

    Rounding up, as `torch.chunk` does, leaves the last parts empty (9 over 4: 3, 3, 3, 0).
    """
    return total * index // parts, total * (index + 1) // parts


def full_box(shape: Sequence[int]) -> Box:
    """The box that covers a tensor."""
    return tuple((0, size) for size in shape)


def box_size(box: Box) -> int:
    """Number of elements in a box."""
    return math.prod(stop - start for start, stop in box)


def lengths(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def intersect(a: Box, b: Box) -> Box | None:
    """The common part of two boxes of one tensor, or None where they do not meet."""
    assert len(a) == len(b), (a, b)
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in common) else common


def without(box: Box, others: Iterable[Box]) -> list[Box]:
    """What of `box` none of `others` covers, as boxes that do not meet."""
    left = [box] if box_size(box) else []
    for other in others:
        left = [rest for part in left for rest in _minus(part, other)]
    return left


def _minus(box: Box, other: Box) -> list[Box]:
    """`box` without `other`: at most two boxes for each dim."""
    common = intersect(box, other)
    if common is None:
        return [box]
    rest: list[Box] = []
    for dim, ((start, stop), (low, high)) in enumerate(zip(box, common, strict=True)):
        for first, last in ((start, low), (high, stop)):
            if first < last:
                rest.append((*common[:dim], (first, last), *box[dim + 1 :]))
    return rest


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes that cover elements `[start, stop)` of a tensor in row-major order.

    At most `2 * dims - 1` boxes (an optimizer shard of a flat buffer is such a range).
    """
    total = math.prod(shape)
    assert 0 <= start <= stop <= total, (shape, start, stop)
    if start == stop:
        return []
    if start == 0 and stop == total:
        return [full_box(shape)]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    boxes: list[Box] = []

    def inside(index: int, low: int, high: int) -> None:
        boxes.extend(((index, index + 1), *rest) for rest in flat_boxes(shape[1:], low, high))

    if first > last:  # the range lies inside one row
        inside(start // row, start % row, stop % row or row)
        return boxes
    if start % row:
        inside(start // row, start % row, row)
    if first < last:
        boxes.append(((first, last), *full_box(shape[1:])))
    if stop % row:
        inside(stop // row, 0, stop % row)
    return boxes
