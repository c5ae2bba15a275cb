"""Layouts as they were given, held against the rules of plans and the models. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from planner.layouts import EVERY, option
from realflow.errors import InputError, Problem
from realflow.models.card import Card
from realflow.models.layouts import cut_problem, unsupported
from realflow.models.partition import with_head
from realflow.planfile import Plan
from realflow.planfile.check import rule_problems, why_not_free


def settle(plan: Plan, layouts: Mapping[str, str], cards: Mapping[str, Card]) -> Plan:
    """The plan of the layouts that were given, if it keeps all rules and its models can be cut so.

    `free` that was given for all calls holds for those that can let go of their weights; a note names
    the others. Raises InputError whose problems name the layout as it was given, each once for all of
    its calls.
    """
    freed = [
        call.name
        for call in plan.graph.calls
        if call.model and call.name not in layouts and plan.calls[call.name].after == "free"
    ]
    kept = _with_after(plan, freed, "keep")
    problems = unsupported(plan.graph, cards) or [*_cuts(plan, layouts, cards), *_rules(kept, layouts)]
    if problems:
        raise InputError(dict.fromkeys(problems))
    return _freed(kept, freed, layouts) if freed else plan


def _cuts(plan: Plan, layouts: Mapping[str, str], cards: Mapping[str, Card]) -> list[Problem]:
    """Layouts that models cannot be cut for: one problem for each that was given."""
    models: dict[str, dict[str, Card]] = {}
    layout_of = {}
    for call in plan.graph.calls:
        if call.model:
            where = option(layouts, call.name)
            own = with_head(cards[call.model], plan.graph.models[call.model].head)
            models.setdefault(where, {})[call.model] = own
            layout_of[where] = plan.calls[call.name].layout
    found = {where: cut_problem(layout_of[where], some) for where, some in models.items()}
    return [Problem(message, where=where) for where, message in found.items() if message]


def _rules(plan: Plan, layouts: Mapping[str, str]) -> list[Problem]:
    """Rules that the plan breaks; those of calls name what was given for them."""
    problems = []
    for problem in rule_problems(plan):
        top, _, rest = problem.where.partition(".")
        name = rest.rpartition(".")[0]
        given = name in layouts or EVERY in layouts
        problems.append(
            replace(problem, where=option(layouts, name)) if top == "calls" and given else problem
        )
    return problems


def _freed(plan: Plan, names: list[str], layouts: Mapping[str, str]) -> Plan:
    """Of calls that were to free their weights, those do that can."""
    reasons = {name: why_not_free(plan, name) for name in names}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        why = "; ".join(dict.fromkeys(filter(None, reasons.values())))
        raise InputError(
            Problem(f"no call can free its weights: {why}; remove free", where=option(layouts, names[0]))
        )
    kept = [name for name in names if name not in able]
    one = len(kept) == 1
    notes = [
        f"After: free holds for {' and '.join(able)}; {' and '.join(kept)} keep{'s' * one} "
        f"{'its' if one else 'their'} weights."
    ]
    return replace(_with_after(plan, able, "free"), notes=(*plan.notes, *(notes if kept else [])))


def _with_after(plan: Plan, names: list[str], after: Literal["keep", "free"]) -> Plan:
    changed = {name: replace(plan.calls[name], after=after) for name in names}
    return replace(plan, calls={**plan.calls, **changed})
