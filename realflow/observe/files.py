"""Files that a killed process leaves readable: lines appended in one write, files renamed into place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realflow.errors import RunError

_BLOCK = 1 << 16
"""Bytes read at a time to find the end of the last whole line."""


class AppendFile:
    """A file that grows by whole records: each `write` is one `os.write` on an O_APPEND descriptor.

    A process killed between two writes leaves complete records only. A kill within a write of several
    pages, like a crash of the machine, can cut the last record short: its readers leave it out, and if
    `lines` it is cut off before anything is appended.
    """

    def __init__(self, path: Path, *, lines: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if lines:
            self._drop_cut_line()

    def _drop_cut_line(self) -> None:
        """Shorten the file to the end of its last whole line."""
        end = os.fstat(self._fd).st_size
        while end:
            start = max(0, end - _BLOCK)
            found = os.pread(self._fd, end - start, start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, end)

    def write(self, record: bytes) -> int:
        """Append one record. Raises RunError where it does not fit; the file then ends as before."""
        size = os.fstat(self._fd).st_size
        written = os.write(self._fd, record)
        if written != len(record):
            os.ftruncate(self._fd, size)
            raise RunError(
                f"{self.path}: only {written} of {len(record)} bytes could be written; is the disk full?"
            )
        return written

    def flush(self) -> None:
        """Nothing is buffered here; present because record writers call it."""

    def close(self) -> None:
        """Close the descriptor; closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def json_line(row: dict[str, Any]) -> bytes:
    """One line of strict JSON. Non-finite floats become null, at any depth."""
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate (a broken character of a model's text) has no UTF-8 form: escape it.
    return (text + "\n").encode("utf-8", errors="backslashreplace")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, one by one; lines that are no JSON object are left out."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def write_whole(path: Path, content: str) -> None:
    """Write a text file beside its place and rename it, so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
