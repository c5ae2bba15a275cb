"""Whether models can be cut as a plan says. Pure: cards only, no torch, no processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import log2

from realflow.errors import InputError, Problem
from realflow.graph.types import Graph
from realflow.layout import Layout
from realflow.models.card import Card, cached, card
from realflow.models.partition import partition, with_head
from realflow.models.paths import resolve_model
from realflow.planfile import CallPlan, Plan

_NAMED = 5  # layouts that a message names


def check_layouts(plan: Plan) -> None:
    """Raise InputError for every call of a plan whose layout its model cannot be cut for."""
    problems = plan_problems(plan)
    if problems:
        raise InputError(problems)


def plan_problems(plan: Plan, say: Callable[[str], None] | None = None) -> list[Problem]:
    """What `layout_problems` finds in a plan that is to run on this machine.

    Only models that are cut need a card, from the cache or made now (seconds, in another process):
    `say` is told before.
    """
    cut = {call.model for call in plan.graph.calls if call.model and is_cut(plan.calls[call.name].layout)}
    cards = {name: card(resolve_model(plan.graph.models[name].path), say) for name in sorted(cut)}
    return layout_problems(plan.graph, plan.calls, cards)


def known_cards(plan: Plan) -> dict[str, Card]:
    """The cards that a plan was made with, as far as they are in this machine's cache."""
    found = {name: cached(plan.cards[name]) for name in plan.graph.models if name in plan.cards}
    return {name: known for name, known in found.items() if known is not None}


def layout_problems(graph: Graph, calls: Mapping[str, CallPlan], cards: Mapping[str, Card]) -> list[Problem]:
    """Models that cannot run at all, and what cannot be cut as `calls` say: call, layout, the reason,
    and layouts of as many ranks that work. Models without a card are passed over."""
    known = {name: with_head(cards[name], spec.head) for name, spec in graph.models.items() if name in cards}
    problems = [
        Problem(reason, where=f"graph.models.{name}")
        for name, own in known.items()
        if (reason := own.unsupported or own.unsupported_head)
    ]
    if problems:
        return problems
    for call in graph.calls:
        if call.model is None or call.model not in known:
            continue
        layout, own = calls[call.name].layout, known[call.model]
        reasons = refusals(own, layout)
        if reasons:
            works = ", ".join(str(other) for other in nearest(accepted(own, layout.size), layout))
            message = (
                f"{layout} cannot cut {call.model}: {'; '.join(reasons)}. "
                f"Of {layout.size} ranks these work: {works}"
            )
            problems.append(Problem(message, where=f"calls.{call.name}.layout"))
    return problems


def is_cut(layout: Layout) -> bool:
    """Whether a layout divides the model itself, and not only the data."""
    return layout.dp < layout.size


def refusals(card: Card, layout: Layout) -> list[str]:
    """Why a model cannot be cut for a layout; empty where it can."""
    try:
        partition(card, layout)
    except InputError as error:
        return [problem.message for problem in error.problems]
    return []


def accepted(card: Card, ranks: int) -> list[Layout]:
    """Every layout of `ranks` ranks that a model can be cut for, in rising order of p, then t."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    every = [Layout(ranks // (tp * pp), tp, pp) for pp in sizes for tp in sizes if ranks % (tp * pp) == 0]
    return [layout for layout in every if not refusals(card, layout)]


def nearest(layouts: Iterable[Layout], wanted: Layout) -> list[Layout]:
    """The few layouts that are most like `wanted`."""

    def distance(layout: Layout) -> float:
        return sum(
            abs(log2(getattr(layout, axis)) - log2(getattr(wanted, axis))) for axis in ("dp", "tp", "pp")
        )

    return sorted(layouts, key=lambda layout: (distance(layout), layout))[:_NAMED]
