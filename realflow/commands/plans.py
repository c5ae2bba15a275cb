"""`realflow plan` and `explain`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from planner import Assumptions, moves, overfull, parse_layouts, rank_memory, with_memory
from realflow import api
from realflow.commands.common import (
    AddCommand,
    asked,
    graph_arguments,
    layout_arguments,
    say,
    search_arguments,
)
from realflow.errors import InputError, Problem
from realflow.graph import shipped_graphs
from realflow.models.card import Card
from realflow.planfile import Plan, ReallocPlan, plan_to_yaml, read_plan, write_plan


def add_commands(add: AddCommand) -> None:
    """Add the commands of this module."""
    plan = add(
        "plan",
        run_plan,
        "find where and how each call of a graph runs, so that a step is as short as can be",
        "realflow plan grpo prompts=16 --devices 2 -o plan.yaml\n"
        "  realflow plan ppo --cluster cluster.yaml --fix rollout=d4t2@0-7 --effort high -o plan.yaml\n"
        "  realflow plan ppo --cluster cluster.yaml --what-if gpus=64,128 max_new_tokens=1024,4096\n"
        "  realflow plan grpo --devices 4 --layout d4 --layout train=p2@2-3:recompute",
    )
    graph_arguments(plan)
    layout_arguments(plan)
    plan.add_argument("-o", "--output", metavar="FILE", help="the plan file to write (default: stdout)")
    search_arguments(plan)
    plan.add_argument(
        "--micro-batch-tokens",
        type=int,
        metavar="N",
        help="token budget of a packed micro-batch (default: searched for; with --layout 4096)",
    )
    plan.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="sequences that a replica decodes at once (default: searched for; with --layout at most 64)",
    )
    plan.add_argument(
        "--what-if",
        nargs="+",
        metavar="NAME=VALUE,...",
        help="compare the plans for several numbers of devices (gpus=...) or values of params; writes none",
    )
    explain = add("explain", run_explain, "check a plan file and show it", "realflow explain plan.yaml")
    explain.add_argument("plan", metavar="PLAN", help="path of a plan file")
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


def run_plan(args: argparse.Namespace) -> None:
    """Plan a graph; write the plan file, or print it. Or compare plans."""
    if args.what_if:
        from realflow.commands.whatif import compare

        compare(args)
        return
    plan = api.plan(
        args.graph,
        devices=args.devices,
        cluster=args.cluster,
        layouts=parse_layouts(args.layout),
        overrides=args.overrides,
        **asked(args),
        say=say,
    )
    if args.output is None:
        print(plan_to_yaml(plan), end="")
        return
    path = write_plan(plan, Path(args.output))
    print(f"{path}: {len(plan.calls)} calls on {plan.world_size} devices{_expected(plan)}")
    for note in plan.notes:
        print(f"note: {note}")
    if overfull(plan):
        print(
            "this plan is not expected to fit into memory; use fewer slots, a smaller --micro-batch-tokens, "
            "a smaller model or more devices"
        )
        print(f"see it: realflow explain {path}")
    else:
        print(f"see it: realflow explain {path}    run it: realflow run {path}")


def _expected(plan: Plan) -> str:
    if plan.step_seconds is None:
        return ""
    gap = "" if plan.gap is None else f" (gap {plan.gap:.1%})"
    return f", {plan.step_seconds:.3g} s a step expected{gap}"


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
    else:
        cards = known_cards(plan)
        render_plan(_as_it_is(plan, cards), cards=cards)


def _as_it_is(plan: Plan, cards: Mapping[str, Card]) -> Plan:
    """A plan with the bytes of its calls as they are: a person may have changed them in the file."""
    if len(cards) == len(plan.graph.models):
        return _with_moves(_with_memory(plan, cards), cards)
    unknown = " and ".join(name for name in plan.graph.models if name not in cards)
    note = (
        f"Bytes are those of the file, and not checked: the card of {unknown} is not on this machine, or not "
        "named under cards."
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


def _with_memory(plan: Plan, cards: Mapping[str, Card]) -> Plan:
    """With the memory of its ranks."""
    if not plan.memory:
        return plan
    memory = rank_memory(plan.graph, plan.calls, cards, plan.cluster, Assumptions())
    anew = with_memory(plan, memory)
    if anew == plan:
        return plan
    kept = [note for note in plan.notes if not note.startswith("Memory: ")]
    note = "Memory is estimated anew: that in the file is of other calls."
    return replace(anew, notes=(*kept, note))
