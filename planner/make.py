"""Making a plan from given layouts. The search for layouts comes in front of this, later."""

from __future__ import annotations

from collections.abc import Mapping

from planner.layouts import place_calls
from planner.memory import Assumptions, rank_memory
from realflow.errors import InputError, Problem
from realflow.graph.types import Call, Graph
from realflow.layout import Layout
from realflow.models.card import Card
from realflow.planfile import (
    CallPlan,
    Cluster,
    Plan,
    ReallocPlan,
    check_plan,
    idle_ranks,
    needed_reallocs,
)
from realflow.planfile.check import ENGINES_OF
from realflow.planfile.ranks import format_ranks

MAX_SLOTS = 64


def make_plan(
    graph: Graph,
    cluster: Cluster,
    layouts: Mapping[str, str],
    cards: Mapping[str, Card],
    *,
    micro_batch_tokens: int = 4096,
    slots: int | None = None,
    assume: Assumptions | None = None,
) -> Plan:
    """The plan of a graph on a cluster, with the layouts that were given.

    `layouts` maps calls (or `*`, all others) to `d2`, `d2@0-1`, ...; `cards` has every model of
    the graph. `slots` is chosen for each generate call unless given. Raises InputError for layouts
    that do not fit or cannot run yet.
    """
    missing = [name for name in graph.models if name not in cards]
    assert not missing, f"no card of {missing}"
    for key, value in (("micro_batch_tokens", micro_batch_tokens), ("slots", slots)):
        if value is not None and value < 1:
            raise InputError(Problem(f"found {value}; expected at least 1", where=key))
    calls = {}
    for name, (layout, ranks) in place_calls(graph, cluster, layouts).items():
        call = graph.call(name)
        calls[name] = CallPlan(
            ranks=ranks,
            layout=layout,
            engine=ENGINES_OF[call.op][0],
            micro_batch_tokens=micro_batch_tokens,
            slots=slots or choose_slots(graph, call, layout) if call.op == "generate" else CallPlan.slots,
        )
    reallocs = tuple(
        ReallocPlan(model, source, destination, bytes=size * ranks, lower_bound_bytes=size * ranks)
        for model, source, destination, ranks in needed_reallocs(graph, calls)
        for size in [cards[model].weight_bytes(graph.models[model].dtype)]
    )
    memory = rank_memory(graph, calls, cards, len(cluster.devices), assume or Assumptions())
    bare = Plan(
        graph=graph,
        cluster=cluster,
        calls=calls,
        cards={name: cards[name].hash for name in graph.models},
        reallocs=reallocs,
        memory=memory,
    )
    plan = Plan(**{**vars(bare), "notes": tuple(_notes(bare))})
    check_plan(plan)
    return plan


def choose_slots(graph: Graph, call: Call, layout: Layout) -> int:
    """Sequences that a replica decodes at once: its share of the step's samples, at most 64.

    The samples of a prompt stay on one replica, because they share its prefill.
    """
    return min(MAX_SLOTS, -(-graph.prompts // layout.dp) * graph.samples)


def _notes(plan: Plan) -> list[str]:
    notes = ["Layouts are as given, not searched; seconds are not estimated. Memory is estimated from cards."]
    idle = idle_ranks(plan)
    if idle:
        notes.append(f"Idle: no call uses rank{'s' * (len(idle) > 1)} {format_ranks(idle)}.")
    limits = [node.memory_bytes for node in plan.cluster.nodes for _ in range(node.devices)]
    for rank, causes in plan.memory.items():
        limit, total = limits[rank], sum(causes.values())
        if limit is not None and total > limit:
            notes.append(
                f"Memory: rank {rank} is expected to need {total / 2**30:.1f} GiB "
                f"of its {limit / 2**30:.1f} GiB."
            )
    return notes
