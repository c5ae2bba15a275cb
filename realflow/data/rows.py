"""Rows of a data source: reasoning-gym tasks, jsonl and parquet files, a Python function.

Each kind is opened by one function and gives `Rows`: any row by its index, always the same one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import mmap
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from realflow.errors import InputError, Problem
from realflow.graph.functions import load_function
from realflow.graph.schema import nearest
from realflow.graph.types import DataSpec

Row = Mapping[str, Any]

CHECKED_BYTES = 64 << 20
"""Lines of a jsonl file that begin within so many bytes are parsed when it is opened, so that a broken
one is found before a run; those behind are parsed when they are read."""


class Rows(Protocol):
    """Rows by index. `place(i)` says where row i comes from, for messages."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...
    def place(self, index: int) -> str:
        """Such as `data.jsonl:17`."""


def open_rows(spec: DataSpec, seed: int, base: Path | None) -> Rows:
    """The rows that a spec names, at most `spec.size`. Raises InputError."""
    if ":" in spec.source:
        return _python_rows(spec, seed, base)
    openers: dict[str, Callable[[], Rows]] = {
        "reasoning_gym": lambda: _reasoning_gym_rows(spec, seed),
        "jsonl": lambda: JsonlRows(_path(spec, base), spec.size),
        "parquet": lambda: _parquet_rows(_path(spec, base), spec.size, _columns(spec)),
    }
    if spec.source not in openers:
        advice = nearest(spec.source, openers)
        raise InputError(
            Problem(
                f"unknown source {spec.source!r}; {advice}, or package.module:function", where="data.source"
            )
        )
    return openers[spec.source]()


def _columns(spec: DataSpec) -> list[str]:
    return list(dict.fromkeys([*spec.fields.values(), *([spec.unique] if spec.unique else [])]))


class SequenceRows:
    """Rows that a sequence of mappings holds."""

    def __init__(self, rows: Sequence[Row], name: str, size: int | None = None) -> None:
        self._rows, self._name = rows, name
        self._size = len(rows) if size is None else min(size, len(rows))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index]
        if not isinstance(row, Mapping):
            raise InputError(f"{self.place(index)}: found {type(row).__name__}, expected a dict")
        return row

    def place(self, index: int) -> str:
        """Such as `my_data:rows, row 17`."""
        return f"{self._name}, row {index}"


class JsonlRows:
    """A file with a JSON object on each line; blank lines are skipped.

    The file is mapped, and only where its lines begin is held (8 bytes a line).
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                if not path.stat().st_size:
                    raise InputError(
                        Problem("the file is empty; expected a JSON object on each line", file=str(path))
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(
                Problem(f"cannot be read: {error.strerror}", where="data.path", file=str(path))
            ) from None
        self._starts = array("Q")
        self._index(size)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        start = self._starts[index]
        end = self._map.find(b"\n", start)
        return self._parse(self._map[start : end if end >= 0 else len(self._map)], start)

    def place(self, index: int) -> str:
        """Such as `data.jsonl:17`."""
        return f"{self.path}:{self._line(self._starts[index])}"

    def _index(self, size: int | None) -> None:
        problems: list[Problem] = []
        start = 3 if self._map[:3] == b"\xef\xbb\xbf" else 0  # a byte order mark
        self._map.seek(start)
        while (size is None or len(self._starts) < size) and (line := self._map.readline()):
            if line.strip():
                self._starts.append(start)
                if start < CHECKED_BYTES and len(problems) < 20:
                    try:
                        self._parse(line, start)
                    except InputError as error:
                        problems += error.problems
            start += len(line)
        if problems:
            raise InputError(problems)
        if not self._starts:
            raise InputError(
                Problem("only blank lines; expected a JSON object on each line", file=str(self.path))
            )

    def _parse(self, line: bytes, start: int) -> Row:
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise self._broken(start, f"not UTF-8 (byte {error.start + 1} of the line)") from None
        except json.JSONDecodeError as error:
            raise self._broken(start, f"not JSON: {error.msg} (column {error.colno})") from None
        except (RecursionError, ValueError) as error:  # nested too deep, or a number of too many digits
            raise self._broken(start, f"not JSON that can be read: {error}") from None
        if not isinstance(row, dict):
            raise self._broken(
                start, f'found {type(row).__name__}, expected a JSON object such as {{"prompt": ...}}'
            )
        return row

    def _broken(self, start: int, message: str) -> InputError:
        return InputError(Problem(message, file=str(self.path), line=self._line(start)))

    def _line(self, start: int) -> int:
        """1-based line number, counted in pieces so that a large file is never copied whole."""
        step = 16 << 20
        return 1 + sum(self._map[at : min(at + step, start)].count(b"\n") for at in range(0, start, step))


def _path(spec: DataSpec, base: Path | None) -> Path:
    if not spec.path:
        raise InputError(Problem(f"source {spec.source} needs a path", where="data.path"))
    path = Path(spec.path).expanduser()
    if base is not None:
        path = base / path
    if not path.is_file():
        raise InputError(Problem(f"no such file: {path}", where="data.path"))
    return path


def _parquet_rows(path: Path, size: int | None, columns: Sequence[str]) -> Rows:
    """The needed columns of a parquet file, held in Arrow's compact form."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            Problem(
                "reading parquet needs pyarrow, which is not installed: pip install pyarrow",
                where="data.source",
            )
        )
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        known = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in columns if name in known])
    except (arrow.ArrowException, OSError) as error:
        raise InputError(Problem(f"not a parquet file that can be read: {error}", file=str(path))) from None
    missing = [name for name in columns if name not in known]
    if missing:
        raise InputError(Problem(f"no column {missing[0]!r}; {nearest(missing[0], known)}", file=str(path)))
    return SequenceRows(_ArrowRows(table), str(path), size)


class _ArrowRows(Sequence[Row]):
    """Rows of an Arrow table as dicts."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]


def _python_rows(spec: DataSpec, seed: int, base: Path | None) -> Rows:
    """What `module:function(**options)` returns: a sequence is used as it is, other rows are listed.

    A parameter called `seed` is given the run's seed, unless the options have one; a `path` of the
    spec is given as the option `path`, made absolute.
    """
    function = load_function(spec.source, base)
    options = dict(spec.options)
    if "seed" in inspect.signature(function).parameters:
        options.setdefault("seed", seed)
    if spec.path is not None:
        options["path"] = str((base or Path()) / Path(spec.path).expanduser())
    try:
        rows = function(**options)
        if not isinstance(rows, Sequence) and not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
            if not isinstance(rows, Iterable):
                raise InputError(f"{spec.source} returned {type(rows).__name__}; expected rows (dicts)")
            rows = list(islice(rows, spec.size))
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a user's function raises what it likes
        raise InputError(
            Problem(f"{spec.source} raised {type(error).__name__}: {error}", where="data.source")
        ) from error
    return SequenceRows(rows, spec.source, spec.size)


def _reasoning_gym_rows(spec: DataSpec, seed: int) -> Rows:
    """A task of reasoning-gym: columns `question`, `answer`, and `entry`, which its scorer reads."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise InputError(
            Problem("this source needs reasoning-gym: pip install reasoning-gym", where="data.source")
        )
    gym = importlib.import_module("reasoning_gym.factory")
    if not spec.task or spec.task not in gym.DATASETS:
        advice = nearest(spec.task or "", gym.DATASETS)
        raise InputError(Problem(f"unknown reasoning-gym task {spec.task!r}; {advice}", where="data.task"))
    known = [field.name for field in fields(gym.DATASETS[spec.task][1])]
    problems = [
        Problem(
            f"task {spec.task} has no option {name!r}; {nearest(name, known)}", where=f"data.options.{name}"
        )
        for name in spec.options
        if name not in known
    ]
    if problems:
        raise InputError(problems)
    options = {"seed": seed, **({} if spec.size is None else {"size": spec.size}), **spec.options}
    try:
        dataset = gym.create_dataset(spec.task, **options)
    except (AssertionError, ValueError, TypeError) as error:
        message = f"task {spec.task} refuses these options: {error or type(error).__name__}"
        raise InputError(Problem(message, where="data.options")) from error
    return SequenceRows(_GymRows(dataset), f"reasoning_gym {spec.task}")


class _GymRows(Sequence[Row]):
    """Entries of a reasoning-gym dataset, each made from its index when it is asked for."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        entry = self._dataset[index]
        return {"question": entry["question"], "answer": entry["answer"], "entry": entry}
