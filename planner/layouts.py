"""Layouts as people give them: `d2`, `d2@0-1`, `rollout=d2@0,1`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from realflow.errors import InputError, Problem
from realflow.graph.types import Graph
from realflow.layout import Layout
from realflow.planfile import Cluster
from realflow.planfile.ranks import parse_ranks

EVERY = "*"
"""The key of a layout that holds for every call without one of its own."""


def parse_layouts(texts: Iterable[str]) -> dict[str, str]:
    """`["d2", "rollout=d1@0"]` -> `{"*": "d2", "rollout": "d1@0"}`. Raises InputError for a repeat."""
    layouts: dict[str, str] = {}
    for text in texts:
        name, equals, layout = text.partition("=")
        key, value = (name, layout) if equals else (EVERY, text)
        if not key:
            raise InputError(
                Problem(
                    f"{text!r} names no call before '='; expected such as rollout=d2, or d2", where="layout"
                )
            )
        if not value.partition("@")[0]:
            raise InputError(
                Problem(f"{text!r} gives no layout; expected such as {_shape(text)}", where="layout")
            )
        if key in layouts:
            what = "a layout for all calls" if key == EVERY else f"the layout of {key}"
            raise InputError(Problem(f"{what} is given twice: {layouts[key]} and {value}", where="layout"))
        layouts[key] = value
    return layouts


def _shape(text: str) -> str:
    """A text that lacks its layout, with one put in."""
    name, equals, rest = text.rpartition("=")
    return f"{name}{equals}d1{rest if rest.startswith('@') else ''}"


def place_calls(
    graph: Graph, cluster: Cluster, layouts: Mapping[str, str]
) -> dict[str, tuple[Layout, tuple[int, ...]]]:
    """Call name -> its layout and ranks.

    A call without a layout of its own takes that of `*`, or `dN` on all N devices. A layout
    without ranks starts at rank 0. A function that must see the whole batch takes the first rank
    of a layout which was not given for it by name.
    """
    problems: list[Problem] = []
    names = [call.name for call in graph.calls]
    for name in layouts:
        if name != EVERY and name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(
                Problem(f"the graph has no call {name}{hint} (calls: {', '.join(names)})", where="layout")
            )
    world = len(cluster.devices)
    default = layouts.get(EVERY, f"d{world}")
    placed = {}
    for call in graph.calls:
        try:
            layout, ranks = _place(layouts.get(call.name, default), world)
        except InputError as error:
            problems += error.problems
            continue
        if call.op == "function" and call.name not in layouts:
            # A function has no model to cut: it runs data-parallel on the same ranks.
            whole = call.decl.scope == "batch"
            layout, ranks = (Layout(), ranks[:1]) if whole else (Layout(dp=len(ranks)), ranks)
        placed[call.name] = (layout, ranks)
    if problems:
        raise InputError(dict.fromkeys(problems))
    return placed


def _place(text: str, world: int) -> tuple[Layout, tuple[int, ...]]:
    def refuse(message: str) -> InputError:
        return InputError(Problem(f"{text!r}{message}", where="layout"))

    shape, at, where = text.partition("@")
    layout = Layout.parse(shape)
    ranks = parse_ranks(where) if at else tuple(range(min(layout.size, world)))
    if ranks is None:
        raise refuse(f": {where!r} are no ranks; expected such as d2@0-1 or d2@0,3")
    if at and len(ranks) != layout.size:
        raise refuse(f": {layout} needs {layout.size} ranks, but {len(ranks)} are given")
    if layout.size > world or max(ranks) >= world:
        raise refuse(f" does not fit: the cluster has {world} devices, ranks 0 to {world - 1}")
    return layout, ranks
