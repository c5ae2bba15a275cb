"""What is worth knowing of a plan that was searched: how much was considered, and what seconds rest on."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain

from planner.hardware import hardware_notes
from planner.options import Built, Models
from planner.search import Solution
from realflow.planfile import Cluster

PROVEN = 1e-4
"""A gap that rounding may leave."""

_SOURCES = {
    "extrapolated": "measured on this machine, but for other sizes",
    "catalogue": "from data sheets, not measured",
}


def search_notes(models: Models, cluster: Cluster, built: Built, solution: Solution) -> list[str]:
    """Notes of a plan, in the order in which they are written."""
    graph = models.graph
    best = (
        "No plan of these options is faster."
        if solution.gap <= PROVEN
        else f"No plan of these options is more than {solution.gap:.1%} faster."
    )
    notes = [
        f"Search: {solution.considered} options (ways of running calls, and places) were considered. {best}"
    ]
    notes.append(f"Lengths: {built.lengths.note}.")
    sources: defaultdict[str, list[str]] = defaultdict(list)
    assumptions: dict[str, None] = {}
    for call in graph.calls:
        cost = built.cost(call.name, solution.choice[call.name].option)
        if cost.source != "measured":
            sources[cost.source].append(call.name)
        assumptions |= dict.fromkeys(cost.assumptions)
    for source in ("extrapolated", "catalogue"):
        if sources[source]:
            notes.append(f"Seconds: those of {' and '.join(sources[source])} are {_SOURCES[source]}.")
    notes += [f"Assumed: {text}." for text in assumptions]
    notes += hardware_notes(cluster)
    if graph.max_staleness:
        notes.append(
            f"Asynchronous: up to {graph.max_staleness + 1} steps overlap; step_seconds is the time between "
            "the ends of two steps in the steady state. The runtime cannot run that yet."
        )
    for name in graph.models:
        if name in models.cards and (reason := models.refused(name)):
            notes.append(f"Model: {name} cannot run yet: {reason}")
    assumed = dict.fromkeys(chain.from_iterable(d.assumed for d in models.decoders.values()))
    notes += [f"Model: {text}." for text in assumed]
    return [*notes, *models.notes]
