"""Rows of columnar files in constant memory: parquet, and the Arrow streams of saved datasets.

Both are read as record batches of about a thousand rows. Nothing is memory-mapped: pages that a map has
touched count as memory of the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from realflow.data.protocol import Row
from realflow.errors import InputError, Problem, RunError
from realflow.graph.schema import nearest

HELD_BYTES = 64 << 20
"""Decoded parquet of a source that is kept in memory; what goes beyond lies in a temporary file."""

BATCH_ROWS = 1024


def need_arrow(source: str) -> Any:
    """The module pyarrow. Raises InputError where it is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            Problem(
                f"reading {source} needs pyarrow, which is not installed: pip install pyarrow",
                where="data.source",
            )
        )
    return importlib.import_module("pyarrow")


def needed(columns: Sequence[str], known: Sequence[str], path: Path) -> list[str]:
    """The columns of a file that hold `columns`, which may be values inside one (`extra.answer`).

    Raises InputError for one that is not there.
    """
    found: dict[str, None] = {}
    for name in columns:
        whole = name if name in known else name.partition(".")[0]
        if whole not in known:
            raise InputError(Problem(f"no column {name!r}; {nearest(whole, known)}", file=str(path)))
        found[whole] = None
    return list(found)


class StreamRows:
    """Rows of a file in Arrow's stream format, such as `datasets` saves.

    Opening reads the file once and keeps where each batch begins (16 bytes a batch).
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self._path, arrow = path, need_arrow("a saved dataset")
        self._ipc = importlib.import_module("pyarrow.ipc")
        self._places, self._first = array("Q"), array("Q", [0])
        try:
            self._index(arrow)
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (arrow.ArrowException, OSError) as error:
            raise InputError(
                Problem(f"not an Arrow stream that can be read: {error}", file=str(path))
            ) from None
        self._size = self._first[-1] if size is None else min(size, self._first[-1])
        self._batch = lru_cache(maxsize=4)(self._read)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def _index(self, arrow: Any) -> None:
        with arrow.OSFile(str(self._path)) as file:
            messages = self._ipc.MessageReader.open_stream(file)
            self.schema = self._ipc.read_schema(messages.read_next_message())
            self._places.append(file.tell())
            for message in iter(lambda: _next(messages), None):
                if message.type != "record batch":
                    raise arrow.ArrowInvalid(f"a {message.type} message; expected plain record batches")
                rows = self._ipc.read_record_batch(message, self.schema).num_rows
                self._first.append(self._first[-1] + rows)
                self._places.append(file.tell())

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Row:
        batch = bisect_right(self._first, index) - 1
        row: Row = self._batch(batch).slice(index - self._first[batch], 1).to_pylist()[0]
        return row

    def _read(self, batch: int) -> Any:
        start, stop = self._places[batch], self._places[batch + 1]
        return self._ipc.read_record_batch(_bytes(self._file, start, stop, self._path), self.schema)

    def place(self, index: int) -> str:
        """Such as `data-00000-of-00001.arrow, row 17`."""
        return f"{self._path}, row {index}"


def _next(messages: Any) -> Any:
    """The next message, or None behind the last one."""
    try:
        return messages.read_next_message()
    except StopIteration:
        return None


def _bytes(file: int, start: int, stop: int, path: Path | str) -> bytes:
    """A part of a file. Raises InputError where it ends before."""
    parts = []
    while start < stop and (part := os.pread(file, stop - start, start)):
        parts.append(part)
        start += len(part)
    if start < stop:
        raise InputError(Problem("the file became shorter while it was read", file=str(path)))
    return b"".join(parts)


class ParquetRows:
    """The needed columns of a parquet file. Opening reads its footer alone.

    A row group is decoded when the first of its rows is asked for, in pieces, and never again: what goes
    beyond `HELD_BYTES` is written to a temporary file (in `TMPDIR`, as large as the rows that were read
    so far, without a name, so that it is gone when the process ends). `files` are read beside each other, and
    share what is kept in memory.
    """

    def __init__(self, path: Path, size: int | None, columns: Sequence[str], files: int = 1) -> None:
        self._path, arrow = path, need_arrow("parquet")
        parquet = importlib.import_module("pyarrow.parquet")
        try:
            self._parquet = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        except (arrow.ArrowException, OSError) as error:
            raise InputError(
                Problem(f"not a parquet file that can be read: {error}", file=str(path))
            ) from None
        schema, metadata = self._parquet.schema_arrow, self._parquet.metadata
        self._columns = needed(columns, schema.names, path)
        for name in self._columns:
            _check_plain(name, schema.field(name).type, path)
        self._first = array("Q", [0])
        for group in range(metadata.num_row_groups):
            self._first.append(self._first[-1] + metadata.row_group(group).num_rows)
        self._size = self._first[-1] if size is None else min(size, self._first[-1])
        self._store = _Store(HELD_BYTES // files)
        self._groups: dict[int, tuple[int, array[int]]] = {}
        """Row group -> its first batch in the store, and the first row of each batch."""
        self._lock = Lock()
        self._errors = (arrow.ArrowException, OSError)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Row:
        group = bisect_right(self._first, index) - 1
        place = index - self._first[group]
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._decode(group)
            stored, starts = self._groups[group]
            batch = bisect_right(starts, place) - 1
            found = self._store.batch(stored + batch)
        row: Row = found.slice(place - starts[batch], 1).to_pylist()[0]
        return row

    def _batches(self, group: int) -> Iterable[Any]:
        """A row group in pieces: read and decoded page by page, never whole."""
        found: Iterable[Any] = self._parquet.iter_batches(
            BATCH_ROWS, row_groups=[group], columns=self._columns, use_threads=False
        )
        return found

    def _decode(self, group: int) -> tuple[int, array[int]]:
        """Put the batches of a row group into the store: where they are there, and in the group."""
        stored, starts = len(self._store), array("Q", [0])
        try:
            for batch in self._batches(group):
                self._store.add(_decoded(batch))
                starts.append(starts[-1] + batch.num_rows)
        except self._errors as error:
            raise InputError(
                Problem(f"row group {group} cannot be read: {error}", file=str(self._path))
            ) from error
        return stored, starts

    def place(self, index: int) -> str:
        """Such as `data.parquet, row 17`."""
        return f"{self._path}, row {index}"


def _check_plain(name: str, kind: Any, path: Path) -> None:
    """A column of categories is read as its values; inside lists and structs pyarrow cannot do that."""
    types = importlib.import_module("pyarrow.types")
    inner = [kind.field(place).type for place in range(kind.num_fields)]
    for part in inner:
        if types.is_dictionary(part):
            raise InputError(
                Problem(
                    f"the column {name!r} has categories ({part}) inside lists or structs, which cannot be "
                    "read; write its plain values",
                    file=str(path),
                )
            )
        _check_plain(name, part, path)


def _decoded(batch: Any) -> Any:
    """The batch with categories as their values."""
    types = importlib.import_module("pyarrow.types")
    columns = [c.dictionary_decode() if types.is_dictionary(c.type) else c for c in batch.columns]
    return type(batch).from_arrays(columns, names=batch.schema.names)


class _Store:
    """Record batches of one schema by their number: the first `most` bytes in memory, then in a file."""

    def __init__(self, most: int) -> None:
        self._held: list[Any] = []
        self._bytes, self._most, self._schema = 0, most, None
        self._file: Any = None
        self._places = array("Q", [0])
        self._ipc = importlib.import_module("pyarrow.ipc")
        self._spilled = lru_cache(maxsize=4)(self._read)

    def __len__(self) -> int:
        return len(self._held) + len(self._places) - 1

    def add(self, batch: Any) -> None:
        """The next batch. Raises RunError where the temporary file cannot be written."""
        self._schema = batch.schema
        if self._file is None and self._bytes + batch.nbytes <= self._most:
            self._bytes += batch.nbytes
            self._held.append(batch)
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the store
            written = self._file.write(batch.serialize())
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"decoded parquet cannot be kept in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR "
                "to a folder with room for the columns that are read"
            ) from error
        self._places.append(self._places[-1] + written)

    def batch(self, number: int) -> Any:
        """A batch that was added."""
        return self._held[number] if number < len(self._held) else self._spilled(number - len(self._held))

    def _read(self, spilled: int) -> Any:
        start, stop = self._places[spilled], self._places[spilled + 1]
        return self._ipc.read_record_batch(
            _bytes(self._file.fileno(), start, stop, "a temporary file"), self._schema
        )


class JoinedRows:
    """The rows of several sources, one after the other."""

    def __init__(self, parts: Iterable[Any]) -> None:
        self._parts = list(parts)
        self._first = array("Q", [0])
        for part in self._parts:
            self._first.append(self._first[-1] + len(part))

    def __len__(self) -> int:
        return self._first[-1]

    def _at(self, index: int) -> tuple[Any, int]:
        part = bisect_right(self._first, index) - 1
        return self._parts[part], index - self._first[part]

    def __getitem__(self, index: int) -> Row:
        part, inner = self._at(index)
        row: Row = part[inner]
        return row

    def place(self, index: int) -> str:
        """Where the row is in its own file."""
        part, inner = self._at(index)
        return str(part.place(inner))
