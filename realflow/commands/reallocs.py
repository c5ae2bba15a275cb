"""`realflow explain plan.yaml --realloc`: what moves along each edge of a plan, against its floor."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from realflow.commands.common import say, when
from realflow.graph.types import Graph
from realflow.layout import box_size
from realflow.models.card import Card, card
from realflow.models.paths import resolve_model
from realflow.planfile import Cluster, Plan
from realflow.planfile.holdings import Edge, Held, follow_edges, held_by, planned_edges
from realflow.planfile.ranks import format_ranks
from realflow.realloc.edges import edge_schedule, specs, topology
from realflow.realloc.topology import Loads, Topology, loads

_PLAIN_WIDTH = 120  # of a pipe or file, which has no width of its own
_LINKS = 4
"""Links shown of an edge: the busiest."""


def render_reallocs(plan: Plan, console: Console | None = None) -> None:
    """Print every edge of a plan: bytes, lower bound, sender and link loads, and the floor's seconds.

    Schedules are made from the models' cards, as a run makes them; nothing is moved.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, _PLAIN_WIDTH)
    edges = [*planned_edges(plan.graph, plan.calls), *follow_edges(plan.graph, plan.calls)]
    if not edges:
        console.print("Reallocation: none, every call has its weights.")
        return
    names = sorted({name for edge in edges for name in (edge.model, edge.into)})
    cards = {name: card(resolve_model(plan.graph.models[name].path), say) for name in names}
    known = topology(plan.cluster)
    for edge in edges:
        found = loads(edge_schedule(plan, edge, cards), known)
        shared = _shared_bytes(plan, edge, cards[edge.model])
        console.print(Text(_title(plan.graph, edge), style="bold"))
        console.print(_table(found, shared, _predicted(plan, edge)))
    console.print(Text(_speeds(known, plan.cluster)))


def _title(graph: Graph, edge: Edge) -> str:
    what = f"{edge.model} for {edge.call}" if edge.call else f"{edge.into} follows {edge.model}"
    return f"{what}{when(graph, edge.call, edge.into)}: {_side(edge.sources)} -> {_side(edge.destinations)}"


def _shared_bytes(plan: Plan, edge: Edge, known: Card) -> int:
    """Bytes of the call's weights that lie where the source's lie: holdings that both use."""
    if not edge.call:
        return 0
    shared = (held_by(plan.calls[edge.call]) - {*edge.destinations}) & {*edge.sources}
    own = specs(known, plan.graph.models[edge.model], sorted(shared)).values()
    return sum(spec.itemsize * box_size(box) for spec in own for _, box in spec.holders)


def _side(held: Sequence[Held]) -> str:
    """`p0/2 on 0-1, p1/2 on 2-3`: each holding with its ranks."""
    by_holding: dict[str, list[int]] = {}
    for rank, holding in held:
        by_holding.setdefault(str(holding), []).append(rank)
    return ", ".join(f"{name} on {format_ranks(ranks)}" for name, ranks in by_holding.items())


def _predicted(plan: Plan, edge: Edge) -> float | None:
    """The seconds that the plan expects of an edge."""
    for realloc in plan.reallocs:
        if (realloc.model, realloc.destination, realloc.follower or realloc.model) == (
            edge.model,
            edge.call,
            edge.into,
        ):
            return realloc.predicted_seconds
    return None


def _table(found: Loads, shared: int, predicted: float | None) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("bytes that move", f"{found.bytes:,}", f"lower bound {found.lower_bound_bytes:,}")
    table.add_row(
        "copied on its rank", f"{found.copied_bytes:,}", "from one layout's memory into the other's"
    )
    if shared:
        table.add_row("shared memory", f"{shared:,}", "used by both calls: neither moved nor copied")
    if found.between_nodes_bytes or found.relayed_bytes:
        relayed = f"{found.relayed_bytes:,} relayed inside nodes"
        table.add_row("between nodes", f"{found.between_nodes_bytes:,}", relayed)
    if found.busiest_sender is not None:
        rank, size = found.busiest_sender
        least = found.busiest_bound_bytes
        bound = f"no choice has less than {least:,}" if size > least else "optimal: no choice has less"
        table.add_row(f"busiest sender: rank {rank}", f"{size:,}", bound)
    for link in found.links[:_LINKS]:
        seconds = "" if link.seconds is None else _seconds(link.seconds)
        table.add_row(link.link, f"{link.bytes:,}", seconds)
    if len(found.links) > _LINKS:
        table.add_row(f"({len(found.links) - _LINKS} links with less)", "")
    if found.floor_seconds is not None:
        expected = "" if predicted is None else f"the plan expects {_seconds(predicted)}"
        table.add_row("floor", _seconds(found.floor_seconds), expected)
    return table


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.3f} ms"


def _speeds(known: Topology, cluster: Cluster) -> str:
    """What the seconds stand on."""
    nodes: dict[tuple[float | None, float | None], list[str]] = {}
    for node in cluster.nodes:
        speeds = (known.speed("inside", node.name), known.speed("between_rank", node.name))
        nodes.setdefault(speeds, []).append(node.name)
    parts = []
    for (inside, between), names in nodes.items():
        assert inside is not None and between is not None, names
        own = f" ({', '.join(names)})" if len(nodes) > 1 else ""
        parts.append(
            f"{inside / 1e9:g} GB/s for a rank inside its node and {between / 1e9:g} GB/s to other nodes{own}"
        )
    return (
        f"Seconds are those of the busiest link at full speed, taken as {'; '.join(parts)}. A run reports "
        "its own beside the floor: realloc/<model>/seconds and realloc/<model>/floor_seconds."
    )
