"""Files that are there whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(new: Path, target: Path) -> None:
    """Rename a file that is complete to `target`, in place of one that is there, and lastingly so."""
    sync(new)
    new.replace(target)
    sync(target.parent)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file to; it is renamed to `target` once the block is left.

    Where the block raises, what was written is removed and `target` stays as it was.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
