"""Parts of a small model, and plans of it, whose memory is counted."""

from __future__ import annotations

import dataclasses

from small_cards import llama_card

from planner import make_plan, parse_layouts
from planner.sizes import Part, Parts
from realflow.graph import find_graph, load_graph
from realflow.graph.types import Graph
from realflow.layout import Layout
from realflow.models.card import Card
from realflow.planfile import CallPlan, Cluster, Node, Plan
from realflow.planfile.holdings import holdings

GRPO = load_graph(find_graph("grpo"))
CARD = llama_card()
GIB = 1 << 30


def plan_of(card: Card, devices: int, *layouts: str, kind: str = "cuda", graph: Graph = GRPO) -> Plan:
    cluster = Cluster((Node("local", devices, kind, 8 * GIB),))
    return make_plan(graph, cluster, parse_layouts(layouts), dict.fromkeys(graph.models, card))


def part_of(card: Card, layout: str = "d1", rank: int = 0, dtype: str = "bfloat16") -> Part:
    sizes = Layout.parse(layout)
    graph = dataclasses.replace(
        GRPO, models={"actor": dataclasses.replace(GRPO.models["actor"], dtype=dtype)}
    )
    where = CallPlan(tuple(range(sizes.size)), sizes, "train")
    return Parts(graph, {"actor": card}).of("actor", holdings(where)[rank])
