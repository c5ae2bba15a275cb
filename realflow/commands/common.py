"""What several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from realflow import api
from realflow.errors import InputError, Problem
from realflow.graph.types import Graph

Command = Callable[[argparse.Namespace], None]


class AddCommand(Protocol):
    """Adds a command: its name, function, one line of help, and an example."""

    def __call__(self, name: str, command: Command, help: str, example: str) -> argparse.ArgumentParser:
        """Add it and return its parser."""
        ...


def graph_arguments(parser: argparse.ArgumentParser) -> None:
    """A graph, and overrides of its params."""
    parser.add_argument(
        "graph",
        metavar="GRAPH",
        help="name of a shipped graph, or path of a graph file; relative paths in it (models, data, "
        "functions) start at its folder, those of models then at the current folder",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="set a param of the graph, such as lr=1e-5",
    )


def layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a graph is planned for."""
    parser.add_argument(
        "--devices", type=int, metavar="N", help="devices of this machine (default: its GPUs, or 2 CPU ranks)"
    )
    parser.add_argument("--cluster", metavar="FILE", help="cluster file, in place of this machine")
    parser.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="[CALL=]LAYOUT[@RANKS][:FLAGS]",
        help="a layout in place of the search, such as d2, d2t2@0-3 or train=p2@0,1:zero_bubble,recompute "
        "(repeat it); without CALL for all other calls, which are d<all> otherwise. d: data, t: tensor, "
        "p: pipeline parallel. Flags of train calls: 1f1b or zero_bubble, recompute, sequence_parallel; of "
        "all calls: keep, offload or free",
    )


def search_arguments(parser: argparse.ArgumentParser) -> None:
    """How layouts are searched for."""
    parser.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="CALL=LAYOUT[@RANKS][:FLAGS]",
        help="fix one call, such as rollout=d4t2@0-7, and search for the others (repeat it)",
    )
    parser.add_argument(
        "--meshes",
        default="any",
        choices=("any", "powers"),
        help="runs of nodes of any length, or of powers of two (default: any)",
    )
    parser.add_argument(
        "--effort",
        default="normal",
        choices=tuple(api.EFFORTS),
        help="how long to search at most (default: normal); less where a plan is proven best",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same plan (default: 0)"
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="what realflow profile measured (default: the one of this machine, where it is planned for)",
    )


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """What `search_arguments` gave, for `api.plan`. Raises InputError for a call that is fixed twice."""
    fixed: dict[str, str] = {}
    for text in args.fix:
        name, equals, how = text.partition("=")
        if not (name and equals and how):
            message = f"{text!r} fixes nothing; expected a call and its layout, such as rollout=d4t2p1@0-7"
            raise InputError(Problem(message, where="--fix"))
        if name in fixed:
            raise InputError(Problem(f"{name} is fixed twice: {fixed[name]} and {how}", where="--fix"))
        fixed[name] = how
    return {
        "fixed": fixed,
        "meshes": args.meshes,
        "effort": args.effort,
        "seed": args.seed,
        "profile": args.profile,
        "micro_batch_tokens": args.micro_batch_tokens,
        "slots": args.slots,
    }


def say(text: str) -> None:
    """Say on stderr what takes long; stdout is for what was asked for."""
    print(f"realflow: {text}", file=sys.stderr, flush=True)


def when(graph: Graph, call: str, into: str) -> str:
    """What a move is besides one of every step: ` (average, every 5 steps)` of a model that follows (`call`
    is empty), ` (every 5 steps)` of a periodic call; empty where it is nothing else."""
    follow = None if call else graph.models[into].follows
    if follow is None:
        words, every = [], graph.call(call).every or 1
    else:
        words, every = ["average"], follow.every
    words += [f"every {every} steps"] if every > 1 else []
    return f" ({', '.join(words)})" if words else ""


def write_text(path: str, text: str) -> None:
    """Write an output file. Raises InputError where it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(Problem(f"cannot be written ({error.strerror})", file=path)) from error
