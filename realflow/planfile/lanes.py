"""A plan's predicted timeline as lanes: ranks that run the same operations share one. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from realflow.planfile.ranks import format_ranks
from realflow.planfile.types import Plan, TimelineEntry

MOVE = "move:"
"""What the name of a move of weights begins with; the call that needs them follows."""

HOSTS = "CPUs"
"""The name of the lane of functions, which take no device."""


@dataclass(frozen=True)
class Lane:
    """What one group of ranks runs, in order of time. `ranks` are empty for functions."""

    ranks: tuple[int, ...]
    entries: tuple[TimelineEntry, ...]

    @property
    def name(self) -> str:
        """The ranks in short."""
        return format_ranks(self.ranks) if self.ranks else HOSTS

    @property
    def busy(self) -> float:
        """Seconds in which something runs."""
        return sum(entry.end - entry.start for entry in self.entries)


def lanes(plan: Plan) -> tuple[Lane, ...]:
    """The lanes of a plan, in order of their ranks; that of functions is the last. Ranks that run nothing
    share one, too."""
    functions = {call.name for call in plan.graph.calls if call.model is None}
    by_rank: dict[int, list[TimelineEntry]] = {rank: [] for rank in range(plan.world_size)}
    hosts = []
    for entry in sorted(plan.timeline, key=lambda entry: (entry.start, entry.end)):
        if entry.what in functions:
            hosts.append(entry)
            continue
        for rank in entry.ranks:
            by_rank[rank].append(entry)
    groups: dict[tuple[TimelineEntry, ...], list[int]] = {}
    for rank, entries in by_rank.items():
        groups.setdefault(tuple(entries), []).append(rank)
    found = [Lane(tuple(ranks), entries) for entries, ranks in groups.items()]
    return (*found, *([Lane((), tuple(hosts))] if hosts else []))


def operation_words(what: str) -> str:
    """An operation in words: `moving weights to rollout`; a call's is its name."""
    return f"moving weights to {what.removeprefix(MOVE)}" if what.startswith(MOVE) else what
