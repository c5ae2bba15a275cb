"""Where prompts come from: row g of the global prompt cursor, on any worker, at any time.

A row is a function of (spec, seed, g) alone. Nothing is stored or sent, and a run that resumes needs
only its cursor. Epochs are shuffled anew; duplicates and held-out texts are left out before.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realflow.data.rows import Row, Rows, open_rows
from realflow.data.shuffle import permute
from realflow.errors import InputError, Problem
from realflow.graph.schema import nearest
from realflow.graph.types import DataSpec


class Source:
    """Prompts, numbered without end. `len()` is the number of rows in an epoch."""

    def __init__(self, spec: DataSpec, rows: Rows, kept: Sequence[int], seed: int) -> None:
        self._spec, self._rows, self._kept, self._seed = spec, rows, kept, seed

    def __len__(self) -> int:
        return len(self._kept)

    def row(self, g: int) -> dict[str, Any]:
        """The fields of prompt `g` (0, 1, 2, ...): `{graph field: value}`.

        Each epoch holds every row once, in an order of its own where `shuffle` is set. Raises
        InputError for a row that lacks a column.
        """
        assert g >= 0, g
        epoch, place = divmod(g, len(self))
        if self._spec.shuffle:
            place = permute(place, len(self), seed=self._seed, epoch=epoch)
        index = self._kept[place]
        return _fields(self._spec.fields, self._rows, index)


def open_source(spec: DataSpec, *, seed: int, base: Path | None = None) -> Source:
    """Open the data that a graph names.

    `base` is the folder that relative paths and modules start from (the working folder where it is
    None). With `unique`, of rows with the same text in that column the first is kept. With `test`,
    `round(test * n)` of the n distinct texts are held out: those first in the order of their
    hashes, which no seed changes, so that a text held out in one run is held out in all.

    Raises InputError: unknown source or task, missing file or column, broken or no rows.
    """
    rows = open_rows(spec, seed, base)
    if not len(rows):
        raise InputError(Problem("there are no rows", where="data"))
    _fields(spec.fields, rows, 0)
    kept: Sequence[int] = range(len(rows))
    if spec.unique is not None:
        kept = _distinct(rows, spec.unique, spec.test, spec.use)
    elif spec.test:
        raise InputError(
            Problem("a held-out part needs `unique`, the column that keeps it apart", where="data.test")
        )
    if not len(kept):
        raise InputError(
            Problem(
                f"no rows are left for {spec.use} of {len(rows)} rows with test {spec.test}",
                where="data.test",
            )
        )
    return Source(spec, rows, kept, seed)


def _distinct(rows: Rows, column: str, test: float, use: str) -> Sequence[int]:
    """Indices of the first row of each distinct text that is in the wanted part, ascending."""
    first: dict[bytes, int] = {}
    for index in range(len(rows)):
        text = str(_column(rows[index], column, rows, index))
        first.setdefault(
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), index
        )
    order = sorted(first)
    held_out = round(test * len(order))
    chosen = order[:held_out] if use == "test" else order[held_out:]
    return array("Q", sorted(first[digest] for digest in chosen))


def _fields(fields: Mapping[str, str], rows: Rows, index: int) -> dict[str, Any]:
    row = rows[index]
    return {field: _column(row, column, rows, index) for field, column in fields.items()}


def _column(row: Row, column: str, rows: Rows, index: int) -> Any:
    if column not in row:
        raise InputError(f"{rows.place(index)}: no column {column!r}; {nearest(column, map(str, row))}")
    return row[column]
