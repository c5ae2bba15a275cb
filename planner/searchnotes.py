"""What is worth knowing of a plan that was searched: how much was considered, and what seconds rest on."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from planner.costs import CallCost
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
    if built.left_out:
        notes.append(
            f"Search: {built.left_out} layouts of calls that fit, too, were left out without proof, because "
            "others of as many devices are faster by themselves: lower_bound_seconds and gap are those of "
            "the options that were kept. With --meshes powers none is left out so."
        )
    notes.append(f"Lengths: {built.lengths.note}.")
    costs = {call.name: built.cost(call.name, solution.choice[call.name].option) for call in graph.calls}
    notes += cost_notes(costs)
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


def cost_notes(costs: Mapping[str, CallCost]) -> list[str]:
    """What the seconds of calls rest on, and what was taken for granted."""
    notes: list[str] = []
    assumptions = dict.fromkeys(text for cost in costs.values() for text in cost.assumptions)
    for source in ("extrapolated", "catalogue"):
        names = [name for name, cost in costs.items() if cost.source == source]
        if names:
            notes.append(f"Seconds: those of {' and '.join(names)} are {_SOURCES[source]}.")
    return [*notes, *(f"Assumed: {text}." for text in assumptions)]
