"""Layouts as people give them: `d2`, `d2t2@0-3`, `train=p2@0,1:zero_bubble,recompute`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from realflow.errors import InputError, Problem
from realflow.graph.types import Call, Graph
from realflow.layout import Layout
from realflow.models.card import Card
from realflow.models.layouts import by_reasons, working
from realflow.models.partition import with_head
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
                    f"{text!r} names no call before '='; expected such as rollout=d2, or d2", where="--layout"
                )
            )
        if not value.partition(":")[0].partition("@")[0]:
            raise InputError(
                Problem(f"{text!r} gives no layout; expected such as {_shape(text)}", where="--layout")
            )
        if key in layouts:
            what = "a layout for all calls" if key == EVERY else f"the layout of {key}"
            raise InputError(Problem(f"{what} is given twice: {layouts[key]} and {value}", where="--layout"))
        layouts[key] = value
    return layouts


def _shape(text: str) -> str:
    """A text that lacks its layout, with one put in."""
    name, equals, rest = text.rpartition("=")
    return f"{name}{equals}d1{rest if rest.startswith(('@', ':')) else ''}"


def place_calls(
    graph: Graph, cluster: Cluster, layouts: Mapping[str, str], cards: Mapping[str, Card]
) -> dict[str, Choice]:
    """Call name -> its layout, ranks and flags.

    A call without a layout of its own takes that of `*`, or `dN` on all N devices. A layout
    without ranks starts at rank 0. A function that must see the whole batch takes the first rank
    of a layout which was not given for it by name. Flags given for all calls go to those calls
    that they mean something to. Problems name the layout as it was given, once for all its calls;
    of one with too many ranks `cards` tell what would work instead.
    """
    problems: list[Problem] = []
    names = [call.name for call in graph.calls]
    for name in layouts:
        if name != EVERY and name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            message = f"the graph has no call {name}{hint} (calls: {', '.join(names)})"
            problems.append(Problem(message, where=option(layouts, name)))
    world = len(cluster.devices)
    placed = {}
    for (_, text), calls in _by_text(graph, layouts, world).items():
        models = {call.model: with_head(cards[call.model], graph.models[call.model].head)
                  for call in calls if call.model}  # fmt: skip
        where = option(layouts, calls[0].name)
        try:
            chosen = read_choice(text, world, models)
        except InputError as error:
            problems += [replace(problem, where=where) for problem in error.problems]
            continue
        for call in calls:
            placed[call.name] = chosen if call.name in layouts else _fitted(call, chosen)
            problems += [Problem(reason, where=where) for reason in _unmeant(call, placed[call.name].flags)]
    if problems:
        raise InputError(dict.fromkeys(problems))
    return placed


def option(layouts: Mapping[str, str], call: str) -> str:
    """How the layout of a call was asked for: `--layout t2`, `--layout ref=d1@1`; without one of its own or
    for all, the plan's key."""
    key = call if call in layouts else EVERY
    if key not in layouts:
        return f"calls.{call}"
    return f"--layout {'' if key == EVERY else f'{key}='}{layouts[key]}"


def _by_text(graph: Graph, layouts: Mapping[str, str], world: int) -> dict[tuple[str, str], list[Call]]:
    """The key and text of a layout -> its calls."""
    found: dict[tuple[str, str], list[Call]] = {}
    for call in graph.calls:
        key = call.name if call.name in layouts else EVERY
        found.setdefault((key, layouts.get(key, f"d{world}")), []).append(call)
    return found


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


def _unmeant(call: Call, flags: Mapping[str, Any]) -> Iterator[str]:
    """Flags that mean nothing to a call, even those that are what it does anyway."""
    for word in words_of(flags):
        if call.op != "train" and FLAGS[word][0] in OF_TRAINING:
            yield f"only train calls have {word}, and {call.name} is {call.op}: remove it"
        elif call.op == "function":
            yield f"{call.name} is a function and holds no weights: remove {word}"


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """The words for keys of a call in the plan file and their values."""
    return [word for word, (key, value) in FLAGS.items() if key in flags and flags[key] == value]


def read_choice(text: str, world: int, models: Mapping[str, Card] | None = None) -> Choice:
    """Read `LAYOUT[@RANKS][:FLAG,...]` for a cluster of `world` devices.

    Raises InputError; where there are too few devices with what `models` (name -> card, with the
    model's head) say of the layout, and those of all devices that work.
    """

    def refuse(message: str) -> InputError:
        return InputError(Problem(message, where="layout"))

    place, colon, words = text.partition(":")
    shape, at, where = place.partition("@")
    layout = Layout.parse(shape)
    ranks = parse_ranks(where) if at else tuple(range(min(layout.size, world)))
    if ranks is None:
        raise refuse(f"{where!r} are no ranks; expected such as d2@0-1 or d2@0,3")
    if at and len(ranks) != layout.size:
        raise refuse(f"{layout} needs {layout.size} ranks, but {len(ranks)} are given")
    if layout.size > world or max(ranks) >= world:
        raise refuse(_too_large(layout, ranks, world, models or {}))
    flags: dict[str, Any] = {}
    given: dict[str, str] = {}
    for word in words.split(",") if colon else ():
        problem = _flag_problem(word, given)
        if problem:
            raise refuse(problem)
        key, flags[key] = FLAGS[word]
        given[key] = word
    return Choice(layout, ranks, flags)


def _too_large(layout: Layout, ranks: tuple[int, ...], world: int, models: Mapping[str, Card]) -> str:
    """Why a layout does not fit: too many ranks, or others than there are, and what a model says of it."""
    have = f"the cluster has {world} device{'s' * (world > 1)} (rank{'s 0 to' * (world > 1)} {world - 1})"
    if layout.size <= world:
        return f"does not fit: rank {max(ranks)} is given, but {have}"
    message = f"does not fit: {layout} needs {layout.size} ranks, but {have}"
    for reasons, names in by_reasons(layout, models).items():
        message += f"; nor can it cut {' and '.join(names)}: {'; '.join(reasons)}"
    works = working(models.values(), world, layout) if models else str(Layout(dp=world))
    return f"{message}. Of {world} rank{'s' * (world > 1)} these work: {works}" if works else message


def _flag_problem(word: str, given: Mapping[str, str]) -> str | None:
    if word not in FLAGS:
        close = difflib.get_close_matches(word, FLAGS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{word!r} is none of {', '.join(FLAGS)}{hint}"
    before = given.get(FLAGS[word][0])
    if before == word:
        return f"{word} is given twice"
    return f"{before} and {word} exclude each other" if before else None
