"""Making a plan from given layouts. `planner.searched` finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from planner.fitting import memory_notes
from planner.given import settle
from planner.layouts import place_calls
from planner.memory import Assumptions, rank_memory, with_memory
from realflow.errors import InputError, Problem
from realflow.graph.types import Call, Graph
from realflow.layout import Layout
from realflow.models.card import Card
from realflow.planfile import CallPlan, Cluster, Plan, ReallocPlan, check_plan, needed_reallocs
from realflow.planfile.check import ENGINES_OF
from realflow.planfile.notes import after_notes, idle_notes
from realflow.realloc.edges import edge_schedule

MAX_SLOTS = 64
MIN_MICRO_BATCH = 16
"""Tokens; a smaller budget can only be a slip."""


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
    positions = {name: card.max_positions for name, card in cards.items()}
    problems = [*check_amounts(graph, micro_batch_tokens, slots), *check_lengths(graph, positions)]
    if problems:
        raise InputError(problems)
    chosen = place_calls(graph, cluster, layouts, cards)
    calls = {
        call.name: CallPlan(
            ranks=chosen[call.name].ranks,
            layout=chosen[call.name].layout,
            engine=ENGINES_OF[call.op][0],
            micro_batch_tokens=micro_batch_tokens,
            slots=_slots(graph, call, chosen[call.name].layout, slots),
            **chosen[call.name].flags,
        )
        for call in graph.calls
    }
    given = Plan(graph, cluster, calls, cards={name: cards[name].hash for name in graph.models})
    bare = settle(given, layouts, cards)
    memory = rank_memory(graph, bare.calls, cards, cluster, assume or Assumptions())
    plan = with_memory(replace(bare, reallocs=moves(bare, cards)), memory)
    full = memory_notes(
        plan, cards, assume or Assumptions(), lambda call, how: _slots(graph, call, how, None)
    )
    plan = replace(plan, notes=(*_notes(plan), *full, *bare.notes, *length_notes(graph, positions)))
    check_plan(plan)
    return plan


def _slots(graph: Graph, call: Call, layout: Layout, given: int | None) -> int:
    if call.op != "generate":
        return CallPlan.slots
    return given or choose_slots(graph, call, layout)


def moves(plan: Plan, cards: Mapping[str, Card]) -> tuple[ReallocPlan, ...]:
    """The moves of a step, with the bytes of the very schedules that the run will carry out."""
    found: dict[tuple[str, str, str], ReallocPlan] = {}
    for realloc, edge in needed_reallocs(plan.graph, plan.calls):
        schedule = edge_schedule(plan, edge, cards)
        key = (realloc.model, realloc.destination, realloc.follower)
        before = found.get(key, realloc)  # a follower with several holdings on a rank has several edges
        found[key] = replace(
            realloc,
            bytes=before.bytes + schedule.bytes,
            lower_bound_bytes=before.lower_bound_bytes + schedule.lower_bound_bytes,
        )
    return tuple(found.values())


def check_amounts(graph: Graph, micro_batch_tokens: int | None, slots: int | None) -> list[Problem]:
    """Amounts that no run can mean; None is none given."""
    problems = []
    if micro_batch_tokens is not None and micro_batch_tokens < MIN_MICRO_BATCH:
        message = (
            f"found {micro_batch_tokens}; expected at least {MIN_MICRO_BATCH}, and better thousands: it is "
            "how many tokens a device computes at once"
        )
        problems.append(Problem(message, where="micro_batch_tokens"))
    most = graph.prompts * graph.samples
    if slots is not None and slots < 1:
        problems.append(Problem(f"found {slots}; expected at least 1", where="slots"))
    elif slots is not None and slots > most:
        message = f"found {slots}, but a step has {most} samples: expected at most that many"
        problems.append(Problem(message, where="slots"))
    return problems


def check_lengths(graph: Graph, positions: Mapping[str, int]) -> list[Problem]:
    """Responses that the `positions` of a model cannot hold."""
    problems = []
    for call in graph.calls:
        if call.sampling is None or call.model is None:
            continue
        new, most = call.sampling.max_new_tokens, positions[call.model]
        if new >= most:
            message = (
                f"found {new}, but {call.model} has {most} positions for prompt and response together; "
                f"expected less than {most}"
            )
            problems.append(Problem(message, where=f"graph.calls.{call.name}.max_new_tokens"))
    return problems


def length_notes(graph: Graph, positions: Mapping[str, int]) -> list[str]:
    """Prompts that are allowed, but leave no room for a whole response."""
    notes = []
    for call in graph.calls:
        if call.sampling is None or call.model is None:
            continue
        room = positions[call.model] - call.sampling.max_new_tokens
        if graph.data.prompt_tokens > room:
            notes.append(
                f"Length: {call.name} takes prompts of up to {graph.data.prompt_tokens} tokens "
                f"(data.max_length), but beside {call.sampling.max_new_tokens} new ones the "
                f"{positions[call.model]} positions of {call.model} have room for {room}."
            )
    return notes


def choose_slots(graph: Graph, call: Call, layout: Layout) -> int:
    """Sequences that a replica decodes at once: its share of the step's samples, at most 64.

    The samples of a prompt stay on one replica, because they share its prefill.
    """
    return min(MAX_SLOTS, -(-graph.prompts // layout.dp) * graph.samples)


def _notes(plan: Plan) -> list[str]:
    notes = ["Layouts are as given, not searched; seconds are not estimated. Memory is estimated from cards."]
    return [*notes, *idle_notes(plan), *after_notes(plan)]
