"""A plan made by hand, without a model."""

from __future__ import annotations

from realflow.graph import find_graph, load_graph
from realflow.layout import Layout
from realflow.planfile import (
    CallPlan,
    Cluster,
    Node,
    Plan,
    ReallocPlan,
)
from realflow.planfile.check import ENGINES_OF

GRAPHS = {name: load_graph(find_graph(name)) for name in ("grpo", "sft")}


def plain_plan() -> Plan:
    """grpo with rollout on ranks 0 and 1, training and ref on 2."""
    graph = GRAPHS["grpo"]
    where = {"rollout": (0, 1), "train": (2,), "ref": (2,)}
    calls = {
        call.name: CallPlan(
            where.get(call.name, (0,)), Layout(dp=len(where.get(call.name, (0,)))), ENGINES_OF[call.op][0]
        )
        for call in graph.calls
    }
    reallocs = (ReallocPlan("actor", "train", "rollout", 200, 200),)
    return Plan(graph, Cluster((Node("local", 3),)), calls, reallocs=reallocs, memory={0: {"weights": 5}})
