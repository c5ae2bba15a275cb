"""`realflow check`, `draw` and `graphs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from realflow.commands.common import AddCommand, graph_arguments, write_text
from realflow.errors import InputError, Problem
from realflow.graph import (
    describe,
    explain_batch,
    find_graph,
    load_graph,
    notes,
    shipped_graphs,
    to_mermaid,
    to_svg,
)
from realflow.models.fitting import check_fitting
from realflow.models.paths import absent, find_model
from realflow.rewards.sandbox import Sandbox
from realflow.rewards.sandbox.ability import runs_code


def add_commands(add: AddCommand) -> None:
    """Add the commands of this module."""
    check = add("check", run_check, "check a graph file", "realflow check grpo prompts=16 --explain batch")
    graph_arguments(check)
    check.add_argument("--explain", choices=["batch"], help="say how a step's batch is divided")
    draw = add("draw", run_draw, "draw a graph as SVG or mermaid", "realflow draw grpo -o grpo.svg")
    graph_arguments(draw)
    draw.add_argument(
        "-o", "--output", metavar="FILE", help="FILE.svg or FILE.mmd (default: mermaid on stdout)"
    )
    add("graphs", run_graphs, "list the graphs that come with RealFlow", "realflow graphs")


def run_check(args: argparse.Namespace) -> None:
    """Check a graph and say what it is."""
    graph = load_graph(find_graph(args.graph), args.overrides)
    check_fitting(graph)
    print(f"{graph.name}: correct. {describe(graph)}")
    for note in notes(graph):
        print(f"note: {note}")
    if runs_code(graph):
        print(f"note: {Sandbox.check().words}")
    for name, model in graph.models.items():
        if find_model(model.path) is None:
            print(f"note: models.{name}.path: {absent(model.path)}")
    if args.explain == "batch":
        print(explain_batch(graph).rstrip())


def run_draw(args: argparse.Namespace) -> None:
    """Draw a graph into a file, or as mermaid on stdout."""
    kind = Path(args.output).suffix.lower() if args.output else ".mmd"
    if kind not in (".svg", ".mmd", ".mermaid", ".md"):
        raise InputError(
            Problem(f"{args.output!r} has no known ending; expected .svg, .mmd or .md", where="--output")
        )
    graph = load_graph(find_graph(args.graph), args.overrides)
    text = to_svg(graph) if kind == ".svg" else to_mermaid(graph)
    if kind == ".md":
        text = f"```mermaid\n{text.rstrip()}\n```\n"
    if args.output is None:
        print(text.rstrip())
        return
    write_text(args.output, text)
    print(args.output)


def run_graphs(args: argparse.Namespace) -> None:
    """List the shipped graphs."""
    shipped = shipped_graphs()
    width = max((len(name) for name in shipped), default=0)
    for name, path in sorted(shipped.items()):
        print(f"{name:{width}}  {_first_comment(path)}".rstrip())


def _first_comment(path: Path) -> str:
    """What a graph file says of itself in its first line."""
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return line.lstrip("# ") if line.startswith("#") else ""
