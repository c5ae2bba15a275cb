"""Where prompts come from: row g of the global prompt cursor, on any worker, at any time.

A row is a function of (spec, seed, g) alone. Nothing is stored or sent, and a run that resumes needs
only its cursor. Epochs are shuffled anew; duplicates and held-out texts are left out before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from realflow.data.distinct import distinct
from realflow.data.mixture import Turns
from realflow.data.protocol import Row, Rows
from realflow.data.rows import open_rows
from realflow.data.shuffle import mix, permute
from realflow.errors import InputError, Problem
from realflow.graph.datasection import SOURCE_FIELD
from realflow.graph.schema import nearest
from realflow.graph.types import DataSpec


class Prompts(Protocol):
    """Prompts, numbered without end. `len()` is the number of rows that there are."""

    def __len__(self) -> int: ...
    def row(self, g: int, again: int = 0) -> dict[str, Any]:
        """The fields of prompt `g` (0, 1, 2, ...): `{graph field: value}`.

        `again` counts the rows that prompt g has been given before and that could not be used: another
        row of the same source stands in for them.
        """


class Source:
    """Prompts of one source. `len()` is the number of rows in an epoch."""

    def __init__(self, spec: DataSpec, rows: Rows, kept: Sequence[int], seed: int) -> None:
        self._spec, self._rows, self._kept, self._seed = spec, rows, kept, seed

    def __len__(self) -> int:
        return len(self._kept)

    def row(self, g: int, again: int = 0) -> dict[str, Any]:
        """The fields of prompt `g` (see `Prompts`).

        Each epoch holds every row once, in an order of its own where `shuffle` is set. Rows that stand in
        for others are drawn from the whole epoch (for each `again` by another permutation, so that a row
        stands in for one other at most), and so come in it a second time. Raises InputError for a row
        that lacks a column.
        """
        assert g >= 0, g
        epoch, place = divmod(g, len(self))
        if again:
            place = permute(place, len(self), seed=mix(self._seed) + again, epoch=epoch)
        elif self._spec.shuffle:
            place = permute(place, len(self), seed=self._seed, epoch=epoch)
        index = self._kept[place]
        return _fields(self._spec.fields, self._rows, index)


class Mixture:
    """Prompts of several sources, in turns that are as even as their weights allow."""

    def __init__(self, names: Sequence[str], sources: Sequence[Source], turns: Turns) -> None:
        self._names, self._sources, self._turns = names, sources, turns

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def row(self, g: int, again: int = 0) -> dict[str, Any]:
        """The fields of prompt `g` (see `Prompts`), and the name of its source."""
        assert g >= 0, g
        source, place = self._turns.at(g)
        return {**self._sources[source].row(place, again), SOURCE_FIELD: self._names[source]}


def open_source(spec: DataSpec, *, seed: int, base: Path | None = None) -> Prompts:
    """Open the data that a graph names.

    `base` is the folder that relative paths and modules start from (the working folder where it is
    None). With `unique`, of rows with the same text in that column the first is kept. With `test`,
    `round(test * n)` of the n distinct texts are held out: those first in the order of their
    hashes, which no seed changes, so that a text held out in one run is held out in all.

    Raises InputError: unknown source or task, missing file or column, broken or no rows.
    """
    if not spec.sources:
        return _open_one(spec, seed, base)
    sources, problems = [], list[Problem]()
    for part in spec.sources:
        # Each shuffles for itself, in an order that only its name decides: others may come and go.
        digest = hashlib.blake2b(f"{seed} {part.name}".encode(), digest_size=8).digest()
        own = int.from_bytes(digest, "little")
        try:
            sources.append(_open_one(replace(part.data, shuffle=spec.shuffle), own, base))
        except InputError as error:
            problems += [replace(p, message=f"source {part.name}: {p.message}") for p in error.problems]
    if problems:
        raise InputError(problems)
    names, weights = [part.name for part in spec.sources], [part.weight for part in spec.sources]
    return Mixture(names, sources, Turns(weights, seed))


def _open_one(spec: DataSpec, seed: int, base: Path | None) -> Source:
    rows = open_rows(spec, seed, base)
    if not len(rows):
        raise InputError(Problem("there are no rows", where="data"))
    _fields(spec.fields, rows, 0)
    kept: Sequence[int] = range(len(rows))
    if spec.unique is not None:
        column = spec.unique
        kept = distinct(
            lambda index: str(_column(rows[index], column, rows, index)),
            len(rows),
            test=spec.test,
            use=spec.use,
        )
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


def _fields(fields: Mapping[str, str], rows: Rows, index: int) -> dict[str, Any]:
    row = rows[index]
    return {field: _column(row, column, rows, index) for field, column in fields.items()}


def _column(row: Row, column: str, rows: Rows, index: int) -> Any:
    """The value of a column; a name with dots that is no column leads into mappings and lists."""
    if column in row:
        return row[column]
    value: Any = row
    seen: list[str] = []
    for name in column.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, Sequence) and not isinstance(value, str) and _is_place(name, len(value)):
            value = value[int(name)]
        else:
            raise InputError(f"{rows.place(index)}: {_lacks(value, column, seen)}")
        seen.append(name)
    return value


def _is_place(name: str, size: int) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10 and int(name) < size


def _lacks(value: Any, column: str, seen: Sequence[str]) -> str:
    """What is missing of a column, of which `seen` led to `value`."""
    if not seen:
        return f"no column {column!r}; {nearest(column.partition('.')[0], map(str, value))}"
    path = ".".join(seen)
    if isinstance(value, Mapping):
        name = column.split(".")[len(seen)]
        return f"no column {column!r}: {path!r} has no {name!r}; {nearest(name, map(str, value))}"
    told = f"a list of {len(value)}" if isinstance(value, list | tuple) else type(value).__name__
    return f"no column {column!r}: {path!r} is {told}"
