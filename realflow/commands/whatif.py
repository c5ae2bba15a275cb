"""`realflow plan GRAPH --what-if gpus=64,128 max_new_tokens=1024,4096`: plans compared."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner import local_cluster, read_cluster
from planner.options.refuse import resized
from realflow import api
from realflow.commands.common import asked, say
from realflow.errors import InputError, Problem
from realflow.graph import find_graph, load_graph
from realflow.planfile import Cluster, Plan

DEVICES = ("gpus", "devices")
"""The names that stand for the number of devices."""
MOST = 64
"""Combinations that are compared at most."""
_PLAIN_WIDTH = 160  # of a pipe or file, which has no width of its own


@dataclass(frozen=True)
class Case:
    """One combination: its values, and its plan, or why there is none."""

    values: Mapping[str, str]
    plan: Plan | None
    problem: str = ""


def compare(args: argparse.Namespace, console: Console | None = None) -> None:
    """Plan every combination and print a table. Nothing is written."""
    if args.output is not None or args.layout:
        option = "--layout" if args.layout else "--output"
        raise InputError(Problem("it compares plans that are searched, and writes none", where=option))
    named = _values(args.what_if)
    cluster = local_cluster(args.devices) if args.cluster is None else read_cluster(args.cluster)
    known = load_graph(find_graph(args.graph), args.overrides).params
    unknown = [name for name in named if name not in (*DEVICES, *known)]
    if unknown:
        listed = ", ".join([DEVICES[0], *known])
        raise InputError(Problem(f"the graph has no param {unknown[0]} ({listed})", where="--what-if"))
    cases = []
    for values in product(*named.values()):
        case = dict(zip(named, values, strict=True))
        say(f"planning {', '.join(f'{name}={value}' for name, value in case.items())}")
        cases.append(_case(args, cluster, case))
    _print(cases, console or Console(highlight=False))


def _values(texts: Sequence[str]) -> dict[str, list[str]]:
    """`["gpus=64,128"]` -> `{"gpus": ["64", "128"]}`."""
    found: dict[str, list[str]] = {}
    total = 1
    for text in texts:
        name, equals, listed = text.partition("=")
        values = [value for value in listed.split(",") if value]
        if not (name and equals and values):
            expected = "expected a name and its values, such as gpus=128,256"
            raise InputError(Problem(f"found {text!r}; {expected}", where="--what-if"))
        if name in found:
            raise InputError(Problem(f"{name} is given twice", where="--what-if"))
        found[name] = values
        total *= len(values)
    if total > MOST:
        raise InputError(Problem(f"found {total} combinations; expected at most {MOST}", where="--what-if"))
    return found


def _case(args: argparse.Namespace, cluster: Cluster, values: Mapping[str, str]) -> Case:
    overrides = [*args.overrides]
    for name, value in values.items():
        if name in DEVICES:
            if not value.isdigit() or int(value) < 1:
                message = f"found {name}={value}; expected a number of devices of at least 1"
                raise InputError(Problem(message, where="--what-if"))
            cluster = resized(cluster, int(value))
        else:
            overrides.append(f"{name}={value}")
    try:
        plan = api.plan(args.graph, cluster=cluster, overrides=overrides, **asked(args), say=say)
    except InputError as error:
        return Case(values, None, str(error.problems[0]))
    return Case(values, plan)


def _print(cases: Sequence[Case], console: Console) -> None:
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, _PLAIN_WIDTH)
    names = list(cases[0].values)
    calls = [call.name for call in next((case.plan.graph.calls for case in cases if case.plan), ())
             if call.model]  # fmt: skip
    table = Table(title="What if", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in [*names, "step (s)", "samples/s", "device-s/sample", "gap"]:
        table.add_column(name, justify="right", no_wrap=True)
    for name in calls:
        table.add_column(name)
    for case in cases:
        table.add_row(*map(Text, [*case.values.values(), *_row(case, calls)]))
    console.print(table)
    for case in cases:
        if case.problem:
            told = ", ".join(f"{name}={value}" for name, value in case.values.items())
            console.print(Text(f"{told}: {case.problem}"))


def _row(case: Case, calls: Sequence[str]) -> list[str]:
    plan = case.plan
    if plan is None or plan.step_seconds is None:
        return ["does not fit", "-", "-", "-", *["-"] * len(calls)]
    samples = plan.graph.prompts * plan.graph.samples
    used = plan.world_size * plan.step_seconds / samples
    gap = "-" if plan.gap is None else f"{plan.gap:.1%}"
    layouts = [f"{plan.calls[name].layout}@{_run(plan.calls[name].ranks)}" for name in calls]
    return [f"{plan.step_seconds:.3g}", f"{samples / plan.step_seconds:.3g}", f"{used:.3g}", gap, *layouts]


def _run(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
