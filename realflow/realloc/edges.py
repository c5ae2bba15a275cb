"""From an edge of a plan to its schedule: who holds which boxes of a model. Pure: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from realflow.errors import InputError, Problem
from realflow.graph.types import Graph, ModelSpec
from realflow.layout import Box, Layout
from realflow.models.card import ITEMSIZE, Card
from realflow.models.partition import partition, with_head
from realflow.planfile import Cluster, Plan
from realflow.planfile.holdings import Edge, Held, Holding
from realflow.planfile.kinds import runtime_kind
from realflow.realloc.plan import transfers
from realflow.realloc.schedule import Schedule
from realflow.realloc.specs import TensorSpec
from realflow.realloc.topology import Topology


@dataclass(frozen=True)
class Links:
    """Bytes a second that a rank sends, and receives, inside its node and to other nodes."""

    inside: float
    between: float


ASSUMED: Mapping[str, Links] = {
    "cpu": Links(inside=2.4e9, between=1.25e9),
    "cuda": Links(inside=450e9, between=50e9),
}
"""Kind of device -> its links, where nothing was measured: processes of one machine over gloo and a
10 Gbit/s network; NVLink 4 and a 400 Gbit/s adapter for each GPU."""


def assumed(kind: str) -> Links:
    """The links of a node of this kind, where its cluster says nothing."""
    return ASSUMED[runtime_kind(kind)]


def specs(card: Card, spec: ModelSpec, held: Iterable[Held]) -> dict[str, TensorSpec]:
    """Every parameter of a model with the boxes that holdings have of it (several on one rank, if the
    rank has several holdings), in the dtype that follows, where the model has one of its own."""
    own = with_head(card, spec.head)
    holders: dict[str, dict[tuple[int, Box], None]] = {p.name: {} for p in own.parameters}
    known: dict[Holding, dict[str, Box]] = {}
    for rank, holding in held:
        if holding not in known:
            cut = partition(own, Layout(tp=holding.parts, pp=holding.stages))
            known[holding] = cut.boxes(holding.pp, holding.tp)
        for name, box in known[holding].items():
            holders[name][rank, box] = None
    size = ITEMSIZE[spec.average or spec.dtype]
    return {p.name: TensorSpec(p.shape, size, tuple(holders[p.name])) for p in own.parameters}


def edge_schedule(plan: Plan, edge: Edge, cards: Mapping[str, Card]) -> Schedule:
    """The schedule of an edge of a plan; all parameters of the model, in the card's order.

    `cards` maps models to their cards. Raises InputError where a model cannot be cut as it would have
    to be.
    """
    source, destination = (plan.graph.models[name] for name in (edge.model, edge.into))
    # an average in a wider dtype than it travels in cannot be relayed: what a relay has is rounded
    relays = not edge.decay or source.dtype == (destination.average or destination.dtype)
    return transfers(
        specs(cards[edge.model], source, edge.sources),
        specs(cards[edge.into], destination, edge.destinations),
        topology(plan.cluster) if relays else None,
    )


def wire_dtype(graph: Graph, edge: Edge) -> str:
    """The dtype in which the weights of an edge travel: the destination's, unless the source's is smaller."""
    one, other = graph.models[edge.model], graph.models[edge.into]
    source, destination = one.dtype, other.average or other.dtype
    return source if ITEMSIZE[source] < ITEMSIZE[destination] else destination


def check_follows(graph: Graph, cards: Mapping[str, Card]) -> None:
    """Raise InputError where a model follows one with other parameters."""
    for name, spec in graph.models.items():
        if spec.follows is None:
            continue
        shapes = [
            {p.name: p.shape for p in with_head(cards[m], graph.models[m].head).parameters}
            for m in (name, spec.follows.model)
        ]
        if shapes[0] != shapes[1]:
            parameter = next(iter(sorted({*shapes[0].items()} ^ {*shapes[1].items()})))[0]
            raise InputError(
                Problem(
                    f"{spec.follows.model} has other parameters than {name} (see {parameter}); expected "
                    "models of one config",
                    where=f"graph.models.{name}.follows",
                )
            )


def topology(cluster: Cluster) -> Topology:
    """Where the ranks of a cluster are, and the speeds of each node's links (`ASSUMED` where the cluster
    does not give them)."""
    nodes = dict(enumerate(name.rpartition(":")[0] for name in cluster.devices))
    return Topology(
        nodes,
        inside={node.name: node.inside or assumed(node.kind).inside for node in cluster.nodes},
        between_rank={node.name: node.between or assumed(node.kind).between for node in cluster.nodes},
    )
