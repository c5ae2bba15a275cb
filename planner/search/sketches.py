"""What comes of the class model: values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.search.groups import Group


def ticks_of(devices: int) -> int:
    """Ticks in the longest makespan of interest: times devices they stay inside 32 bits."""
    return max(1 << 16, min(1 << 24, (1 << 30) // max(1, devices)))


@dataclass(frozen=True)
class Span:
    """An operation of a sketch, in ticks."""

    start: int
    end: int
    stage: int = 0


@dataclass(frozen=True)
class Sketch:
    """A solution of the class model: its seconds, the group of each call, spans of calls and moves
    (`MOVE + call`), and pairs of calls of one model that share what they hold, or the second of which has no
    device that the first lacks."""

    makespan: float
    groups: Mapping[str, Group]
    spans: Mapping[str, Span]
    same: frozenset[tuple[str, str]]
    inside: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Found:
    """What the class model says: no plan takes less than `bound` seconds; the best sketches, best first; the
    deterministic seconds that were `spent`."""

    bound: float
    sketches: tuple[Sketch, ...] = ()
    spent: float = 0.0
