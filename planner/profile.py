"""What `realflow profile` stored: reading it, and reading between its points. Pure.

A profile holds tables. A table has what was measured (`what`: layer, ends, decode, all_reduce, ...), under
which circumstances (`key`: model, doing, t, threads, busy, ...), and seconds over one or two `axes` (tokens
and length, slots and context, rows, bytes, elements). Between points seconds are piecewise linear in each
axis, so they lie between their neighbours'. Outside, a reading is that of the nearest place inside, and
says so.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from realflow.errors import InputError, Problem

FORMAT = 1
Key = Mapping[str, str | int]


@dataclass(frozen=True)
class Point:
    """Mean `seconds` at a place on the axes; `noise` is half the distance between the quartiles over
    the median."""

    at: tuple[float, ...]
    seconds: float
    noise: float = 0.0


@dataclass(frozen=True)
class Reading:
    """Seconds at a place `at`: the place asked for where that was `inside` of what was measured, else the
    nearest that was."""

    seconds: float
    at: tuple[float, ...]
    inside: bool


@dataclass(frozen=True)
class Table:
    """Seconds of one thing under one set of circumstances."""

    what: str
    key: Key
    axes: tuple[str, ...]
    points: tuple[Point, ...]

    def read(self, *place: float) -> Reading:
        """Seconds at a place: exact at the points, between those of its neighbours elsewhere."""
        assert len(place) == len(self.axes), (self.what, place, self.axes)
        if len(place) == 1:
            line = self._lines[0]
            at = _clamped(place[0], line)
            return Reading(_between(line, at), (at,), at == place[0])
        return self._read_plane(*place)

    def _read_plane(self, x: float, y: float) -> Reading:
        rows = sorted(self._lines)
        at_y = min(max(y, rows[0]), rows[-1])
        right = min(bisect.bisect_left(rows, at_y), len(rows) - 1)
        left = right if rows[right] == at_y else right - 1
        low, high = self._lines[rows[left]], self._lines[rows[right]]
        at_x = _clamped(x, low)
        share = 0.0 if left == right else (at_y - rows[left]) / (rows[right] - rows[left])
        one, other = _between(low, at_x), _between(high, at_x)
        return Reading(_mixed(one, other, share), (at_x, at_y), (at_x, at_y) == (x, y))

    @cached_property
    def _lines(self) -> dict[float, list[tuple[float, float]]]:
        """For each value of the second axis (0 where there is one axis), (place, seconds) along the first.

        All have the same places. Those that the first row lacks (a profile that was short of time leaves
        points out) are read off its line, and beyond its ends grow in proportion. Those that another row
        lacks, such as passes shorter than their sequences, get the row before's seconds and, for each unit
        of the first axis, what the nearest measured place of the row has more.
        """
        rows: dict[float, dict[float, float]] = {}
        for point in self.points:
            rows.setdefault(point.at[1] if len(point.at) > 1 else 0.0, {})[point.at[0]] = point.seconds
        every = sorted({place for row in rows.values() for place in row})
        found: dict[float, list[tuple[float, float]]] = {}
        before: dict[float, float] = {}
        for name in sorted(rows):
            measured = rows[name]
            row = dict(measured)
            for place in every:
                if place not in row and before:
                    near = min(measured, key=lambda known: (abs(known - place), known))
                    more = measured[near] - before[near]
                    # Less than in the row before can only be noise: in proportion, so that it stays above 0.
                    row[place] = (
                        before[place] + more * place / near
                        if more > 0
                        else before[place] * measured[near] / before[near]
                    )
                elif place not in row:
                    row[place] = _along(sorted(measured.items()), place)
            found[name] = sorted(row.items())
            before = row
        return found


@dataclass(frozen=True)
class Profile:
    """Measurements of one machine.

    `machine` says which (`cores`, `device`, ...), `versions` of what, `commit` of RealFlow. `models` maps a
    model's name to its Hugging Face `config` and `dtype`. `constants` are seconds of bookkeeping.
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str
    models: Mapping[str, Mapping[str, Any]]
    tables: tuple[Table, ...]
    constants: Mapping[str, float]
    hash: str

    @property
    def cores(self) -> int:
        """Cores of the machine."""
        return int(self.machine["cores"])

    def of(self, what: str) -> tuple[Table, ...]:
        """The tables of one thing."""
        return self._by_name.get(what, ())

    @cached_property
    def _by_name(self) -> dict[str, tuple[Table, ...]]:
        found: dict[str, list[Table]] = {}
        for table in self.tables:
            found.setdefault(table.what, []).append(table)
        return {name: tuple(tables) for name, tables in found.items()}

    def noise(self) -> float:
        """The middle noise of all points."""
        found = sorted(point.noise for table in self.tables for point in table.points)
        return found[len(found) // 2] if found else 0.0


def read_profile(path: Path | str) -> Profile:
    """Read a profile. Raises InputError where the file cannot be read, is no profile, was made by another
    format or was changed since."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _wrong(path, "", f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _wrong(path, "", f"is not JSON ({error}); expected what `realflow profile` writes") from error
    if not isinstance(document, dict) or "tables" not in document:
        raise _wrong(path, "", "is no profile; expected what `realflow profile` writes")
    if document.get("format") != FORMAT:
        found = document.get("format")
        raise _wrong(path, "format", f"found {found!r}; expected {FORMAT}: measure again (realflow profile)")
    told = document.pop("hash", None)
    if told != content_hash(document):
        raise _wrong(path, "hash", "the content is not what was measured; measure again (realflow profile)")
    return _Reader(path, document).profile(told)


def content_hash(document: Mapping[str, Any]) -> str:
    """Of a profile's document without its `hash`: SHA-256, 16 digits."""
    text = json.dumps({key: value for key, value in document.items() if key != "hash"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Reader:
    """A profile's document, checked as it is read."""

    path: Path | str
    document: Mapping[str, Any]

    def profile(self, digest: str) -> Profile:
        machine = self._mapping("machine")
        cores = machine.get("cores")
        if not isinstance(cores, int) or cores < 1:
            raise _wrong(self.path, "machine.cores", f"found {cores!r}; expected a whole number above 0")
        return Profile(
            machine=machine,
            versions=self._mapping("versions"),
            commit=str(self.document.get("commit", "")),
            models=self._mapping("models"),
            tables=tuple(self._tables()),
            constants={
                name: self._number(value, f"constants.{name}")
                for name, value in self._mapping("constants").items()
            },
            hash=digest,
        )

    def _tables(self) -> Iterable[Table]:
        listed = self.document["tables"]
        if not isinstance(listed, list):
            raise _wrong(self.path, "tables", "expected a list")
        for index, entry in enumerate(listed):
            where = f"tables[{index}]"
            if not isinstance(entry, dict) or not {"what", "key", "axes", "points"} <= entry.keys():
                raise _wrong(self.path, where, "expected what, key, axes and points")
            axes, points = entry["axes"], entry["points"]
            if not isinstance(axes, list) or len(axes) not in (1, 2) or not isinstance(points, list):
                raise _wrong(self.path, where, "expected one or two axes and a list of points")
            if not points:
                raise _wrong(self.path, where, "has no points")
            yield Table(
                str(entry["what"]),
                dict(entry["key"]),
                tuple(map(str, axes)),
                tuple(self._point(point, len(axes), where) for point in points),
            )

    def _point(self, found: Any, axes: int, where: str) -> Point:
        if not isinstance(found, list) or len(found) != axes + 2:
            raise _wrong(self.path, where, f"found the point {found!r}; expected {axes + 2} numbers")
        numbers = [self._number(value, where) for value in found]
        return Point(tuple(numbers[:axes]), numbers[axes], numbers[axes + 1])

    def _number(self, value: Any, where: str) -> float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right or not math.isfinite(value) or value < 0:
            raise _wrong(self.path, where, f"found {value!r}; expected a number of at least 0")
        return float(value)

    def _mapping(self, name: str) -> Mapping[str, Any]:
        found = self.document.get(name)
        if not isinstance(found, dict):
            raise _wrong(self.path, name, "expected a mapping")
        return found


def _wrong(path: Path | str, where: str, message: str) -> InputError:
    return InputError(Problem(message, file=str(path), where=where))


def _clamped(place: float, line: list[tuple[float, float]]) -> float:
    return min(max(place, line[0][0]), line[-1][0])


def _along(line: list[tuple[float, float]], place: float) -> float:
    """Seconds at a place of a line; beyond its ends in proportion to the place."""
    end = _clamped(place, line)
    return _between(line, end) * (place / end if end else 1.0)


def _between(line: list[tuple[float, float]], place: float) -> float:
    """Seconds at a place of a line; that of its end where the line does not reach it."""
    place = _clamped(place, line)
    right = bisect.bisect_left(line, (place,))
    if right < len(line) and line[right][0] == place:
        return line[right][1]
    (x0, y0), (x1, y1) = line[right - 1], line[right]
    return _mixed(y0, y1, (place - x0) / (x1 - x0))


def _mixed(one: float, other: float, share: float) -> float:
    """Between the two, in spite of rounding."""
    value = one + (other - one) * share
    return min(max(value, min(one, other)), max(one, other))
