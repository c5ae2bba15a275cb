"""Options that are not searched: those that another one is no worse than in everything, and on large clusters
what seldom is worth it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from planner.search import Option
from realflow.layout import Layout

M = TypeVar("M")
Pairs = list[tuple[Option, M]]

MOST = 4
"""Layouts of one size that are kept beside the leanest, on large clusters."""


def undominated(pairs: Sequence[tuple[Option, M]]) -> Pairs[M]:
    """Without options that another one with the same or more places, no more devices, is no worse than."""
    ranked = sorted(pairs, key=lambda pair: (pair[0].size, *_costs(pair[0]), not pair[0].keeps))
    kept: Pairs[M] = []
    for option, meaning in ranked:
        if not any(_beats(other, option) for other, _ in kept):
            kept.append((option, meaning))
    return kept


def _beats(one: Option, other: Option) -> bool:
    """Whether an option can stand in for another: of one size, wherever that may be."""
    if one.places is not other.places and one.places != other.places:
        return False
    if one.keeps != other.keeps:
        return False
    return all(mine <= its for mine, its in zip(_costs(one), _costs(other), strict=True))


def _costs(option: Option) -> tuple[float, int, int, int]:
    return option.duration, option.static_bytes, option.own_bytes, option.active_bytes


def best(sets: Mapping[Layout, Pairs[M]], slack: float) -> dict[Layout, Pairs[M]]:
    """Of the layouts of one size: the fastest few that are not behind the fastest by more than `slack`
    seconds, which is about what moves of weights may gain, and the leanest. No proof: a plan of others may be
    shorter."""
    if not sets:
        return {}
    seconds = {layout: min(option.duration for option, _ in pairs) for layout, pairs in sets.items()}
    least = {
        layout: min(option.static_bytes + option.own_bytes + option.active_bytes for option, _ in pairs)
        for layout, pairs in sets.items()
    }
    ranked = sorted(sets, key=lambda layout: (seconds[layout], least[layout], layout))
    near = [layout for layout in ranked if seconds[layout] <= seconds[ranked[0]] + slack][:MOST]
    leanest = min(ranked, key=lambda layout: (least[layout], seconds[layout], layout))
    return {layout: sets[layout] for layout in dict.fromkeys([*near, leanest])}
