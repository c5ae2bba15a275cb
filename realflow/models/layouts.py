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
    known = _known(graph, cards)
    problems = unsupported(graph, cards)
    if problems:
        return problems
    for call in graph.calls:
        if call.model is None or call.model not in known:
            continue
        message = cut_problem(calls[call.name].layout, {call.model: known[call.model]})
        if message:
            problems.append(Problem(message, where=f"calls.{call.name}.layout"))
    return problems


def unsupported(graph: Graph, cards: Mapping[str, Card]) -> list[Problem]:
    """Models that RealFlow cannot run at all, with the reason."""
    return [
        Problem(reason, where=f"graph.models.{name}")
        for name, own in _known(graph, cards).items()
        if (reason := own.unsupported or own.unsupported_head)
    ]


def _known(graph: Graph, cards: Mapping[str, Card]) -> dict[str, Card]:
    """The cards of a graph's models with the heads that they have there."""
    return {name: with_head(cards[name], spec.head) for name, spec in graph.models.items() if name in cards}


def cut_problem(layout: Layout, models: Mapping[str, Card]) -> str:
    """What is wrong with a layout for models (name -> card, with the model's head), and which ones of as
    many ranks work for all of them; empty where it can cut them all."""
    found = by_reasons(layout, models).items()
    if not found:
        return ""
    reasons = "; ".join(f"{' and '.join(names)}: {'; '.join(why)}" for why, names in found)
    works = working(models.values(), layout.size, layout) or "none"
    return f"{layout} cannot cut {reasons}. Of {layout.size} ranks these work: {works}"


def by_reasons(layout: Layout, models: Mapping[str, Card]) -> dict[tuple[str, ...], list[str]]:
    """Why a layout cannot cut models -> the names of those for which this is so."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, own in models.items():
        if reasons := refusals(own, layout):
            found.setdefault(tuple(reasons), []).append(name)
    return found


def working(models: Iterable[Card], ranks: int, wanted: Layout) -> str:
    """The few layouts of `ranks` ranks most like `wanted` that can cut every model, in words."""
    every = accepted(None, ranks)
    for own in models:
        every = [layout for layout in every if not refusals(own, layout)]
    return ", ".join(map(str, nearest(every, wanted)))


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


def accepted(card: Card | None, ranks: int) -> list[Layout]:
    """Every layout of `ranks` ranks that a model can be cut for (None: all there are), in rising order of p,
    then t."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    every = [Layout(ranks // (tp * pp), tp, pp) for pp in sizes for tp in sizes if ranks % (tp * pp) == 0]
    return [layout for layout in every if card is None or not refusals(card, layout)]


def nearest(layouts: Iterable[Layout], wanted: Layout) -> list[Layout]:
    """The few layouts that are most like `wanted`."""

    def distance(layout: Layout) -> float:
        return sum(
            abs(log2(getattr(layout, axis)) - log2(getattr(wanted, axis))) for axis in ("dp", "tp", "pp")
        )

    return sorted(layouts, key=lambda layout: (distance(layout), layout))[:_NAMED]
