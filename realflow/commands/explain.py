"""`realflow explain`: a plan file, checked, estimated anew and shown."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from planner import Assumptions, moves, rank_memory, with_memory
from planner.critical import advice, path_words
from planner.decoder import Decoder
from planner.estimate import Estimate, estimate, with_estimate
from realflow import api
from realflow.commands.common import AddCommand, write_text
from realflow.errors import InputError, Problem
from realflow.graph import shipped_graphs
from realflow.models.card import Card
from realflow.planfile import Plan, ReallocPlan, read_plan


def add_command(add: AddCommand) -> None:
    """Add the command."""
    explain = add(
        "explain",
        run_explain,
        "check a plan file, estimate it anew and show it",
        "realflow explain plan.yaml\n  realflow explain plan.yaml --html plan.html",
    )
    explain.add_argument("plan", metavar="PLAN", help="path of a plan file")
    explain.add_argument(
        "--html", metavar="FILE", help="write timeline, critical path and plan as one page, too"
    )
    explain.add_argument(
        "--profile",
        metavar="FILE",
        help="what realflow profile measured (default: the one of this machine, where the plan is for it)",
    )
    explain.add_argument(
        "--realloc",
        action="store_true",
        help="show what moves when weights change their layout: bytes, lower bound, loads, floor",
    )
    explain.add_argument(
        "--formulas",
        action="store_true",
        help="show the expressions behind costs (FLOPs, bytes, messages) of each model of a plan, with their "
        "numbers for its layouts, or of a graph; key=value sets params of the graph",
    )
    explain.add_argument(
        "--cut",
        metavar="LAYOUT",
        help="with --formulas: the numbers of all calls in this layout, of d, t, p and (costed, run by no "
        "engine yet) c: context ranks, and e: expert ranks, among those of d and c",
    )
    explain.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=argparse.SUPPRESS)


def run_explain(args: argparse.Namespace) -> None:
    """Check a plan file and show it."""
    if args.formulas:
        from realflow.commands.formulas import render_formulas

        render_formulas(args.plan, args.overrides, args.cut)
        return
    if args.overrides or args.cut:
        args.parser.error(f"only with --formulas: {' '.join(args.overrides) or '--cut'}")
    from realflow.commands.reallocs import render_reallocs
    from realflow.commands.render import render_plan
    from realflow.models.layouts import known_cards, layout_problems

    if args.plan in shipped_graphs() and not Path(args.plan).exists():
        message = f"this is a shipped graph; realflow plan {args.plan} -o plan.yaml makes a plan of it"
        raise InputError(Problem(message, where=args.plan))
    plan = read_plan(args.plan, lambda plan: layout_problems(plan.graph, plan.calls, known_cards(plan)))
    if args.realloc:
        render_reallocs(plan)
        return
    cards = known_cards(plan)
    decoders = api.known_decoders(plan.graph)
    plan = _as_it_is(plan, cards, decoders)
    plan, found = _estimated(plan, decoders, args.profile)
    path, hints = ([], []) if found is None else (path_words(found), advice(found, decoders))
    render_plan(plan, cards=cards, path=path, advice=hints)
    if args.html:
        from realflow.commands.timeline import page

        write_text(args.html, page(plan, path, hints))
        print(f"{args.html}: the timeline as a page")


def _estimated(
    plan: Plan, decoders: Mapping[str, Decoder], profile: str | None
) -> tuple[Plan, Estimate | None]:
    """The plan with its seconds estimated anew; as it is in the file where that cannot be done."""
    unknown = [name for name in plan.graph.models if name not in decoders]
    if unknown:
        note = f"Seconds are those of the file: the config of {' and '.join(unknown)} is not on this machine."
        return replace(plan, notes=(*plan.notes, note)), None
    measured = api.profile_of(profile, plan.cluster, local=_is_here(plan))
    told = plan.hashes.get("profile")
    if told is not None and measured is None:
        note = (
            f"Seconds are those of the file: the profile {told} that they come from is not the one of this "
            "machine; give it with --profile."
        )
        return replace(plan, notes=(*plan.notes, note)), None
    found = estimate(plan, decoders, profile=measured)
    return with_estimate(plan, found), found


def _is_here(plan: Plan) -> bool:
    """Whether a plan is for whatever machine it runs on."""
    return [node.name for node in plan.cluster.nodes] == ["local"]


def _as_it_is(plan: Plan, cards: Mapping[str, Card], decoders: Mapping[str, Decoder]) -> Plan:
    """A plan with the bytes of its calls as they are: a person may have changed them in the file. A model
    that has no card in the plan either was planned from its config."""
    if len(cards) == len(plan.graph.models):
        return _with_moves(_with_memory(plan, cards), cards)
    unknown = [name for name in plan.graph.models if name not in cards]
    if all(name in decoders and name not in plan.cards for name in unknown):
        return _with_memory(plan, cards, decoders)
    note = (
        f"Bytes are those of the file, and not checked: the card of {' and '.join(unknown)} is not on this "
        "machine, or is another one now."
    )
    return replace(plan, notes=(*plan.notes, note))


def _with_moves(plan: Plan, cards: Mapping[str, Card]) -> Plan:
    """With the bytes of its reallocations."""
    counted = {_ends(move): move for move in moves(plan, cards)}
    reallocs = tuple(
        replace(old, bytes=new.bytes, lower_bound_bytes=new.lower_bound_bytes)
        for old in plan.reallocs
        for new in [counted[_ends(old)]]
    )
    if reallocs == plan.reallocs:
        return plan
    note = "Reallocation: bytes are counted anew; those in the file are of other layouts."
    return replace(plan, reallocs=reallocs, notes=(*plan.notes, note))


def _ends(move: ReallocPlan) -> tuple[str, str, str]:
    return move.model, move.destination, move.follower


def _with_memory(
    plan: Plan, cards: Mapping[str, Card], decoders: Mapping[str, Decoder] | None = None
) -> Plan:
    """With the memory of its ranks."""
    if not plan.memory:
        return plan
    memory = rank_memory(plan.graph, plan.calls, cards, plan.cluster, Assumptions(), decoders=decoders)
    anew = with_memory(plan, memory)
    if anew == plan:
        return plan
    kept = [note for note in plan.notes if not note.startswith("Memory: ")]
    note = "Memory is estimated anew: that in the file is of other calls."
    return replace(anew, notes=(*kept, note))
