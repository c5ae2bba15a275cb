"""Datasets that the `datasets` library saved to a folder, read without it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from realflow.data.arrow import JoinedRows, StreamRows, needed
from realflow.data.protocol import Row, Rows
from realflow.errors import InputError, Problem
from realflow.graph.schema import nearest

_SAVED = "expected the folder that datasets' save_to_disk wrote"


def saved_rows(path: Path, split: str | None, size: int | None, columns: Sequence[str]) -> Rows:
    """Rows of the dataset in a folder, which is a Dataset, or the one called `split` of a DatasetDict.

    Raises InputError where there is no such dataset, or a column is missing.
    """
    folder = _dataset(path, split)
    files = [folder / name for name in _files(folder)]
    left, parts = size, list[StreamRows]()
    for file in files:
        parts.append(StreamRows(file, left))
        left = None if left is None else left - len(parts[-1])
        if left == 0:
            break
    for part in parts:
        names = needed(columns, part.schema.names, folder)
    return _Columns(JoinedRows(parts), names)


class _Columns:
    """Rows with the needed columns alone."""

    def __init__(self, rows: Rows, names: Sequence[str]) -> None:
        self._rows, self._names = rows, names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index]
        return {name: row[name] for name in self._names}

    def place(self, index: int) -> str:
        """Where the row is in its file."""
        return self._rows.place(index)


def _dataset(path: Path, split: str | None) -> Path:
    """The folder of the one dataset that is wanted."""
    several = path / "dataset_dict.json"
    if not several.is_file():
        if split is not None:
            raise InputError(
                Problem(f"{path} holds one dataset, no DatasetDict; remove it", where="data.split_name")
            )
        return path
    names = _json(several).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(Problem(f"names no splits; {_SAVED}", file=str(several)))
    if split is None and len(names) > 1:
        raise InputError(
            Problem(f"{path} holds several datasets ({', '.join(names)}); name one", where="data.split_name")
        )
    if split is not None and split not in names:
        raise InputError(Problem(f"no split {split!r}; {nearest(split, names)}", where="data.split_name"))
    return _inside(path, split or names[0], several)


def _files(folder: Path) -> list[str]:
    """The arrow files of a dataset, in order."""
    state = folder / "state.json"
    if not state.is_file():
        raise InputError(Problem(f"{folder}: there is no state.json; {_SAVED}", where="data.path"))
    found = _json(state)
    if any(found.get(key) for key in ("_indices_data_files", "_indices_files")):
        raise InputError(
            Problem(
                "the rows are selected by a file of indices, as old versions of datasets wrote it; load and "
                "save the dataset again with dataset.flatten_indices().save_to_disk(...)",
                file=str(state),
            )
        )
    entries = found.get("_data_files")
    names = [str(entry.get("filename")) for entry in entries or [] if isinstance(entry, dict)]
    if not names:
        raise InputError(Problem(f"lists no data files; {_SAVED}", file=str(state)))
    return [_inside(folder, name, state).name for name in names]


def _inside(folder: Path, name: str, file: Path) -> Path:
    """What lies directly in a folder; a name that leads elsewhere is refused."""
    if Path(name).name != name or name in (".", ".."):
        raise InputError(Problem(f"found {name!r}, expected a name in this folder", file=str(file)))
    return folder / name


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(Problem(f"cannot be read: {error}; {_SAVED}", file=str(path))) from None
    if not isinstance(value, dict):
        raise InputError(Problem(f"found {type(value).__name__}; {_SAVED}", file=str(path)))
    return value
