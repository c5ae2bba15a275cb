"""What is worth knowing of a plan that keeps all rules."""

from __future__ import annotations

from realflow.planfile.check import idle_ranks
from realflow.planfile.holdings import held_by, put_away, users
from realflow.planfile.kinds import runtime_kind
from realflow.planfile.ranks import format_ranks
from realflow.planfile.types import Plan


def idle_notes(plan: Plan) -> list[str]:
    """Ranks of the cluster that no call uses."""
    idle = idle_ranks(plan)
    return [f"Idle: no call uses rank{'s' * (len(idle) > 1)} {format_ranks(idle)}."] if idle else []


def after_notes(plan: Plan) -> list[str]:
    """What it costs, or does not gain, that calls put their weights away."""
    return [*_kept_notes(plan), *_capture_notes(plan)]


def _capture_notes(plan: Plan) -> list[str]:
    """Captured decode steps read weights where they were at capture."""
    notes = []
    kinds = [runtime_kind(node.kind) for node in plan.cluster.nodes for _ in range(node.devices)]
    for call in plan.graph.calls:
        if call.op != "generate" or call.model is None:
            continue
        where = plan.calls[call.name]
        away = put_away(plan.graph, plan.calls, call.model)
        if any(kinds[rank] == "cuda" and away[rank, held] != "keep" for rank, held in held_by(where)):
            notes.append(
                f"Graphs: {call.name}'s weights may come back at another place in the GPU's memory: its "
                "CUDA graphs of decode steps are then captured anew in every step."
            )
    return notes


def _kept_notes(plan: Plan) -> list[str]:
    """Calls that put their weights away, where another call keeps them.

    That is allowed: other ranks, or a train call's gradients and optimizer states, may still gain.
    """
    notes = []
    for call in plan.graph.calls:
        where = plan.calls[call.name]
        if call.model is None or where.after == "keep" or call.op == "train":
            continue
        using = users(plan.graph, plan.calls, call.model)
        away = put_away(plan.graph, plan.calls, call.model)
        own = sorted(held_by(where))
        kept = [rank for rank, held in own if away[rank, held] == "keep"]
        if not kept:
            continue
        keepers = sorted(
            {other.name for held in own for other in using[held] if plan.calls[other.name].after == "keep"}
        )
        one = "s" * (len(keepers) == 1)
        notes.append(
            f"After: {call.name} says {where.after}, but on rank{'s' * (len(kept) > 1)} {format_ranks(kept)} "
            f"{' and '.join(keepers)} use{one} the same weights and keep{one} them."
        )
    return notes
