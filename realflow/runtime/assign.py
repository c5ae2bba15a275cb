"""Which samples go to which data-parallel replica of a call, and into which micro-batch. Pure.

Minibatches are formed globally (`realflow.data.balance.minibatches`), before anything is divided
among ranks; only then is each divided by estimated time, and each replica's part into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from realflow.data.balance import micro_batches, partition
from realflow.graph.types import Call, Graph

Cost = Callable[[int], float]
"""Estimated seconds (in any unit) of a sample of so many tokens."""


def divide(
    ids: Sequence[int],
    lengths: Mapping[int, int],
    parts: int,
    cost: Cost,
    groups: Sequence[int] | None = None,
) -> list[list[int]]:
    """Divide samples among `parts` replicas so that the slowest has as little as can be; ids stay sorted.

    With `groups` (an entry for each id) the samples of a group go to one replica.
    """
    if parts == 1:
        return [list(ids)]
    parcels = partition([cost(lengths.get(sample, 1)) for sample in ids], parts, groups=groups)
    return [sorted(ids[i] for i in parcel) for parcel in parcels]


def together(graph: Graph, call: Call, ids: Sequence[int]) -> list[int] | None:
    """The group of each sample where `call` must not divide groups (`divide`, `micro_batches`), else None."""
    return [sample // graph.samples for sample in ids] if call.whole_groups else None


def packs(
    graph: Graph, call: Call, ids: Sequence[int], lengths: Sequence[int], budget: int
) -> list[list[int]]:
    """The micro-batches of a replica's samples: indices of `ids`, whose tokens are `lengths`.

    Each is of at most `budget` tokens (`micro_batches`); with the call's option `alone` of one sample,
    whatever its length, so that its numbers can be compared with those of a call that packs.
    """
    if call.options.get("alone"):
        return [[index] for index in range(len(ids))]
    return micro_batches(lengths, budget, together(graph, call, ids))


def near_owner(
    unit: Sequence[int], owners: Sequence[Mapping[int, int]], ranks: Sequence[int], load: Mapping[int, int]
) -> int:
    """The rank that should run a function on `unit`: one that already holds the most of its inputs,
    if it is among the call's ranks, else the one with the least to do."""
    held: dict[int, int] = {}
    for table in owners:
        for sample in unit:
            rank = table.get(sample)
            if rank is not None:
                held[rank] = held.get(rank, 0) + 1
    candidates = [rank for rank in ranks if held.get(rank)]
    if candidates:
        return max(candidates, key=lambda rank: (held[rank], -load.get(rank, 0), -rank))
    return min(ranks, key=lambda rank: (load.get(rank, 0), rank))
