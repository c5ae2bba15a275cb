"""A file with a JSON object on each line, of any size: rows are read from it when they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from realflow.data.protocol import Row
from realflow.errors import InputError, Problem

CHECKED_BYTES = 16 << 20
"""Lines that begin within so many bytes are parsed when the file is opened, so that a broken one is found
before a run; those behind are parsed when they are read. Several files share them, as they do `MARKS`."""

MARKS = 1 << 20
"""So many places in the file are held at most (8 bytes each): of each line, and in a longer file of each
second, fourth, ... line."""

_CHUNK = 1 << 18
_BLOCK = 1 << 18
_MARK = b"\xef\xbb\xbf"  # of byte order
_SPACE = np.zeros(256, bool)
_SPACE[list(b" \t\r\v\f")] = True


class JsonlRows:
    """Rows of a jsonl file; blank lines are skipped.

    Opening reads the file once, a gigabyte in about a second, and keeps where every `stride`-th line
    begins: at most 8 MiB for a file of any size, and nothing of the file itself. `files` are read beside
    each other, and share that.
    """

    def __init__(self, path: Path, size: int | None = None, files: int = 1) -> None:
        self.path, self._checked = path, CHECKED_BYTES // files
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(
                Problem(f"cannot be read: {error.strerror}", where="data.path", file=str(path))
            ) from None
        if not os.fstat(self._file).st_size:
            raise InputError(
                Problem("the file is empty; expected a JSON object on each line", file=str(path))
            )
        marks = _Marks(size, max(1, MARKS // files))
        self._scan(marks)
        self._marks, self._stride = marks.places[: marks.kept].copy(), marks.stride
        self._size = marks.lines
        if not self._size:
            raise InputError(
                Problem("only blank lines; expected a JSON object on each line", file=str(self.path))
            )
        self._check()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Row:
        start, line = self._find(index)
        return self._parse(line, start)

    def place(self, index: int) -> str:
        """Such as `data.jsonl:17`."""
        return f"{self.path}:{self._line(self._find(index)[0])}"

    def _scan(self, marks: _Marks) -> None:
        """Note where lines begin, a chunk of the file at a time."""
        buffer = np.empty(_CHUNK, np.uint8)
        at = len(_MARK) if os.pread(self._file, len(_MARK), 0) == _MARK else 0
        start, blank = at, True  # of the line that goes on into the next chunk
        while not marks.full and (count := os.preadv(self._file, [buffer.data], at)):
            chunk = buffer[:count]
            ends = np.flatnonzero(chunk == 10)
            if not len(ends):
                blank = blank and bool(_SPACE[chunk].all())
                at += count
                continue
            first_blank = blank and bool(_SPACE[chunk[: ends[0]]].all())
            starts = np.concatenate([[start], at + ends[:-1] + 1])
            marks.add(starts[~_blanks(chunk, ends, first_blank)])
            start = at + int(ends[-1]) + 1
            blank = bool(_SPACE[chunk[ends[-1] + 1 :]].all())
            at += count
        if not marks.full and not blank:  # the last line has no end
            marks.add(np.array([start]))

    def _find(self, index: int) -> tuple[int, bytes]:
        """Where line `index` (blank ones not counted) begins, and its bytes."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        mark, ahead = divmod(index, self._stride)
        start = int(self._marks[mark])
        next_mark = int(self._marks[mark + 1]) if mark + 1 < len(self._marks) else start + _BLOCK
        for found in islice(self._lines(start, min(next_mark - start, _BLOCK)), ahead, ahead + 1):
            return found
        raise InputError(Problem("the file became shorter while it was read", file=str(self.path)))

    def _lines(self, at: int, block: int) -> Iterator[tuple[int, bytes]]:
        """Lines that are not blank, each with where it begins, from a place in the file on."""
        start, parts = at, list[bytes]()
        while piece := os.pread(self._file, block, at):
            begin = 0
            while (end := piece.find(b"\n", begin)) >= 0:
                line = b"".join([*parts, piece[begin:end]])
                parts.clear()
                if line and not line.isspace():
                    yield start, line
                begin = end + 1
                start = at + begin
            parts.append(piece[begin:])
            at += len(piece)
        line = b"".join(parts)
        if line and not line.isspace():
            yield start, line

    def _check(self) -> None:
        """Parse the lines near the beginning, and report those that are broken together."""
        problems: list[Problem] = []
        for start, line in islice(self._lines(int(self._marks[0]), _CHUNK), self._size):
            if start >= self._checked or len(problems) >= 20:
                break
            try:
                self._parse(line, start)
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)

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
        """1-based line number, counted in pieces so that a large file is never held whole."""
        return 1 + sum(
            os.pread(self._file, min(_BLOCK, start - at), at).count(b"\n") for at in range(0, start, _BLOCK)
        )


class _Marks:
    """Where every `stride`-th line begins, at most `most` of them, of at most `size` lines (None: of all)."""

    def __init__(self, size: int | None, most: int) -> None:
        self.places = np.empty(1024, np.uint64)
        self.kept, self.stride, self.lines, self._size, self._most = 0, 1, 0, size, most

    @property
    def full(self) -> bool:
        """No more lines are wanted."""
        return self._size is not None and self.lines >= self._size

    def add(self, starts: np.ndarray) -> None:
        """The next lines. Where there are too many marks, every second one is dropped."""
        if self._size is not None:
            starts = starts[: self._size - self.lines]
        first = -self.lines % self.stride
        self._append(starts[first :: self.stride])
        self.lines += len(starts)
        while self.kept > self._most:
            self.places, self.stride = self.places[: self.kept : 2].copy(), 2 * self.stride
            self.kept = len(self.places)

    def _append(self, places: np.ndarray) -> None:
        need = self.kept + len(places)
        if need > len(self.places):
            grown = np.empty(max(need, 2 * len(self.places)), np.uint64)
            grown[: self.kept] = self.places[: self.kept]
            self.places = grown
        self.places[self.kept : need] = places
        self.kept = need


def _blanks(chunk: np.ndarray, ends: np.ndarray, first: bool) -> np.ndarray:
    """Which of the lines that end at `ends` are blank; `first` says so of the first one.

    Only a line whose first and last character are spaces can be blank, and has to be looked through.
    """
    starts = np.concatenate([[0], ends[:-1] + 1])
    empty = starts == ends
    blank = empty | (_SPACE[chunk[starts]] & _SPACE[chunk[ends - 1]])
    for place in np.flatnonzero(blank & ~empty):
        blank[place] = bool(_SPACE[chunk[starts[place] : ends[place]]].all())
    blank[0] = first
    return blank
