"""Layouts as people give them: `d2`, `d2t2@0-3`, `train=p2@0,1:zero_bubble,recompute`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from realflow.errors import InputError, Problem
from realflow.graph.types import Call, Graph
from realflow.layout import Layout
from realflow.planfile import Cluster
from realflow.planfile.flags import FLAGS, OF_TRAINING
from realflow.planfile.ranks import parse_ranks

EVERY = "*"
"""The key of a layout that holds for every call without one of its own."""


@dataclass(frozen=True)
class Choice:
    """Where and how one call runs: `flags` are keys of its `CallPlan`."""

    layout: Layout
    ranks: tuple[int, ...]
    flags: Mapping[str, Any] = field(default_factory=dict)


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
        if not value.partition(":")[0].partition("@")[0]:
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
    return f"{name}{equals}d1{rest if rest.startswith(('@', ':')) else ''}"


def place_calls(graph: Graph, cluster: Cluster, layouts: Mapping[str, str]) -> dict[str, Choice]:
    """Call name -> its layout, ranks and flags.

    A call without a layout of its own takes that of `*`, or `dN` on all N devices. A layout
    without ranks starts at rank 0. A function that must see the whole batch takes the first rank
    of a layout which was not given for it by name. Flags given for all calls go to those calls
    that they mean something to.
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
            chosen = read_choice(layouts.get(call.name, default), world)
        except InputError as error:
            problems += error.problems
            continue
        placed[call.name] = chosen if call.name in layouts else _fitted(call, chosen)
    if problems:
        raise InputError(dict.fromkeys(problems))
    return placed


def _fitted(call: Call, given: Choice) -> Choice:
    """What a layout that was given for all calls means for one of them."""
    if call.op == "function":
        # A function has no model to cut: it runs data-parallel on the same ranks.
        whole = call.decl.scope == "batch"
        ranks = given.ranks[:1] if whole else given.ranks
        return Choice(Layout(dp=len(ranks)), ranks)
    if call.op == "train":
        return given
    return Choice(
        given.layout,
        given.ranks,
        {key: value for key, value in given.flags.items() if key not in OF_TRAINING},
    )


def read_choice(text: str, world: int) -> Choice:
    """Read `LAYOUT[@RANKS][:FLAG,...]` for a cluster of `world` devices. Raises InputError."""

    def refuse(message: str) -> InputError:
        return InputError(Problem(f"{text!r}{message}", where="layout"))

    place, colon, words = text.partition(":")
    shape, at, where = place.partition("@")
    layout = Layout.parse(shape)
    ranks = parse_ranks(where) if at else tuple(range(min(layout.size, world)))
    if ranks is None:
        raise refuse(f": {where!r} are no ranks; expected such as d2@0-1 or d2@0,3")
    if at and len(ranks) != layout.size:
        raise refuse(f": {layout} needs {layout.size} ranks, but {len(ranks)} are given")
    if layout.size > world or max(ranks) >= world:
        raise refuse(f" does not fit: the cluster has {world} devices, ranks 0 to {world - 1}")
    flags: dict[str, Any] = {}
    given: dict[str, str] = {}
    for word in words.split(",") if colon else ():
        problem = _flag_problem(word, given)
        if problem:
            raise refuse(f": {problem}")
        key, flags[key] = FLAGS[word]
        given[key] = word
    return Choice(layout, ranks, flags)


def _flag_problem(word: str, given: Mapping[str, str]) -> str | None:
    if word not in FLAGS:
        close = difflib.get_close_matches(word, FLAGS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{word!r} is none of {', '.join(FLAGS)}{hint}"
    before = given.get(FLAGS[word][0])
    if before == word:
        return f"{word} is given twice"
    return f"{before} and {word} exclude each other" if before else None
