"""What `realflow profile` stored: reading it, and reading between its points. Pure.

A profile holds tables. A table has what was measured (`what`: layer, head, decode, all_reduce, ...), under
which circumstances (`key`: model, phase, t, threads, busy, ...), and seconds over one or two `axes` (tokens and
length, slots and context, bytes, elements).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Key = tuple[tuple[str, str | int], ...]
"""Names and values, by name."""


@dataclass(frozen=True)
class Point:
    """Median `seconds` at a place on the axes; `noise` is half the distance between the quartiles over
    the median."""

    at: tuple[float, ...]
    seconds: float
    noise: float


@dataclass(frozen=True)
class Table:
    """Seconds of one thing under one set of circumstances."""

    what: str
    key: Key
    axes: tuple[str, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Profile:
    """Measurements of one machine. `models` maps a model's name to its Hugging Face config and dtype."""

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str
    models: Mapping[str, Mapping[str, Any]]
    tables: tuple[Table, ...]
    hash: str
