"""What holds for the calls of a graph on a cluster, whatever options they have."""

from __future__ import annotations

from collections.abc import Mapping

from planner.costs import Costs
from planner.decoder import Decoder
from planner.lengths import Lengths
from planner.meshes import Pool
from planner.profile import Profile
from planner.rates import is_of, make_rates
from realflow.graph.types import Call, Graph


def comes_after(graph: Graph, call: Call) -> tuple[str, ...]:
    """Calls that come before another one: writers of what it reads; without overlap of steps, a train call
    ends the use of its model's weights."""
    found = {w.name: None for name in call.reads.values() if (w := graph.writer(name)) is not None}
    if call.op == "train" and not graph.max_staleness:
        found |= {
            other.name: None for other in graph.calls if other.model == call.model and other is not call
        }
    return tuple(found)


def costs_on(
    pool: Pool,
    graph: Graph,
    decoders: Mapping[str, Decoder],
    lengths: Lengths,
    profile: Profile | None,
    function_seconds: Mapping[str, float],
) -> Costs:
    """What calls cost on the devices of a pool. `profile` counts where it was measured on such devices."""
    rates = make_rates(pool.node, profile if profile and is_of(profile, pool.node) else None)
    return Costs(
        graph, decoders, lengths, rates, per_node=pool.node.devices, function_seconds=function_seconds
    )
