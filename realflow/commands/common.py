"""What several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

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
        help="such as d2, d2t2@0-3 or train=p2@0,1:zero_bubble,recompute (repeat it); without CALL for all "
        "calls (default: d<all>). d: data, t: tensor, p: pipeline parallel. Flags of train calls: 1f1b or "
        "zero_bubble, recompute, sequence_parallel; of all calls: keep, offload or free",
    )


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
