"""Rows of a data source: files, saved datasets, reasoning-gym tasks, a Python function.

Each kind is opened by one function and gives `Rows`: any row by its index, always the same one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from realflow.data.arrow import JoinedRows, ParquetRows
from realflow.data.hf import saved_rows
from realflow.data.jsonl import JsonlRows
from realflow.data.protocol import Row, Rows
from realflow.errors import InputError, Problem
from realflow.graph.datasection import PATTERN
from realflow.graph.functions import load_function
from realflow.graph.schema import nearest
from realflow.graph.types import DataSpec


def open_rows(spec: DataSpec, seed: int, base: Path | None) -> Rows:
    """The rows that a spec names, at most `spec.size`. Raises InputError."""
    if ":" in spec.source:
        return _python_rows(spec, seed, base)
    openers: dict[str, Callable[[], Rows]] = {
        "reasoning_gym": lambda: _reasoning_gym_rows(spec, seed),
        "jsonl": lambda: _joined(spec, base, JsonlRows),
        "parquet": lambda: _joined(
            spec, base, lambda path, size, files: ParquetRows(path, size, _columns(spec), files)
        ),
        "hf": lambda: saved_rows(_path(spec, base), spec.split_name, spec.size, _columns(spec)),
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


def _path(spec: DataSpec, base: Path | None) -> Path:
    if not spec.path:
        raise InputError(Problem(f"source {spec.source} needs a path", where="data.path"))
    path = Path(spec.path).expanduser()
    return path if base is None else base / path


def _joined(spec: DataSpec, base: Path | None, open_one: Callable[[Path, int | None, int], Rows]) -> Rows:
    """The rows of the file that the path names, or of all files that it is the pattern of, in the order
    of their names."""
    path = _path(spec, base)
    paths = [path]
    if PATTERN & set(path.name) and not path.exists():
        paths = sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
    if not paths or not all(path.is_file() for path in paths):
        wrong = next((path for path in paths if not path.is_file()), path)
        raise InputError(Problem(f"no such file: {wrong}", where="data.path"))
    left, parts = spec.size, list[Rows]()
    for found in paths:
        parts.append(open_one(found, left, len(paths)))
        left = None if left is None else left - len(parts[-1])
        if left == 0:
            break
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


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
