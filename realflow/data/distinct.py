"""Rows that differ in a column, and the part of them that is held out.

Costs a pass over all rows when the data is opened (rows that are equal are read twice), about 50 bytes a row
while it lasts, and then 8 bytes for each row that is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

_DIGEST = 16


def distinct(text: Callable[[int], str], rows: int, *, test: float, use: str) -> Sequence[int]:
    """Indices of the first row of each distinct text that is in the wanted part, ascending.

    `text(i)` is the text of row i of `rows`. Held out are `round(test * n)` of the n distinct texts, those
    first in the order of their digests. Rows are told apart by eight bytes of a digest; those that are
    equal in them are read again, and told apart by all sixteen.
    """
    short = np.empty(rows, np.uint64)
    for index in range(rows):
        short[index] = int.from_bytes(_digest(text(index))[:8], "big")
    order = np.argsort(short, kind="stable")  # rows of one digest stay in their order
    found = _firsts(short[order], order, text)
    held_out = round(test * len(found))
    chosen = found[:held_out] if use == "test" else found[held_out:]
    chosen.sort()
    return _Indices(chosen)


def _firsts(ordered: np.ndarray, order: np.ndarray, text: Callable[[int], str]) -> np.ndarray:
    """Of each distinct text the first row, in the order of digests. `ordered` are short digests, ascending,
    and `order` their rows."""
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(np.concatenate([starts, [len(ordered)]]))
    firsts = order[starts]
    extra: list[tuple[int, list[int]]] = []
    for place in map(int, np.flatnonzero(counts > 1)):
        rows = order[starts[place] : starts[place] + counts[place]]
        # Two texts with the same eight bytes: among 10 million that happens once in a million data sets.
        first: dict[bytes, int] = {}
        for row in map(int, rows):
            first.setdefault(_digest(text(row)), row)
        if len(first) > 1:
            extra.append((place, [first[digest] for digest in sorted(first)]))
    for place, several in reversed(extra):
        firsts = np.concatenate([firsts[:place], several, firsts[place + 1 :]])
    return firsts


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()


class _Indices(Sequence[int]):
    """An array of indices as a sequence of ints."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values.copy()  # a part of an array would keep the whole

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]  # no slices are taken
        return int(self._values[index])
