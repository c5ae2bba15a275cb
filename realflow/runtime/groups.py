"""The process groups of a plan: all of them, made at the start, by all ranks in one order."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from realflow.models.place import groups_of
from realflow.planfile import Plan


def needed_groups(plan: Plan) -> list[tuple[int, ...]]:
    """Every set of ranks that some call's collectives need, in an order that is the same anywhere."""
    found: set[tuple[int, ...]] = set()
    for call in plan.graph.calls:
        if call.op != "function":
            found |= groups_of(plan.calls[call.name].mesh)
    return sorted(found)


def make_groups(plan: Plan) -> Mapping[tuple[int, ...], dist.ProcessGroup]:
    """Make them. `torch.distributed` must be initialised with the plan's ranks."""
    return {ranks: dist.new_group(list(ranks)) for ranks in needed_groups(plan)}
