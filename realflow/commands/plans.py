"""`realflow plan`."""

from __future__ import annotations

import argparse
from pathlib import Path

from planner import overfull, parse_layouts
from realflow import api
from realflow.commands.common import (
    AddCommand,
    asked,
    graph_arguments,
    layout_arguments,
    say,
    search_arguments,
)
from realflow.planfile import Plan, plan_to_yaml, write_plan


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
