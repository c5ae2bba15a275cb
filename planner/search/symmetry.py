"""Devices that can be exchanged: of plans that differ in nothing else, the exact model needs to see one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.search.positions import Positions
from planner.search.problem import Call, Problem

Exchange = tuple[int, ...]
"""Device -> the one in its place."""

_DEEP = 3
"""How many calls have their places reduced, each within what the ones before leave unchanged."""


def break_symmetry(problem: Problem, space: Positions) -> None:
    """Forbids places that exchanges of devices turn into others, for one call after the other."""
    found = [one for one in _candidates(problem.devices) if _is_symmetry(problem, one)]
    calls = sorted(problem.calls, key=lambda call: -len(_places(call)))[:_DEEP]
    _reduce(space, calls, found, [])


def _reduce(space: Positions, calls: list[Call], symmetries: list[Exchange], given: list[Any]) -> None:
    """Of each set of places that `symmetries` turn into each other the first alone, given literals."""
    if not calls or not symmetries:
        return
    call, *others = calls
    first = _firsts(_places(call), symmetries)
    at: dict[range, list[Any]] = {place: [] for place in first}
    for pair, literal in zip(space.pairs[call.name], space.taken[call.name], strict=True):
        at[pair.place].append(literal)
        if first[pair.place] != pair.place:
            space.model.add_implication(literal, False) if not given else space.model.add_bool_or(
                ~literal, *(~one for one in given)
            )
    for place in dict.fromkeys(first.values()):
        here = space.any(at[place], f"{call.name}@{place.start}+{len(place)}")
        unchanged = [one for one in symmetries if _image(place, one) == place]
        _reduce(space, others, unchanged, [*given, here])


def _firsts(places: list[range], symmetries: list[Exchange]) -> dict[range, range]:
    """Place -> the first of those that exchanges turn it into."""
    first: dict[range, range] = {}
    for place in places:
        if place in first:
            continue
        reached, new = {place}, [place]
        while new:
            images = {_image(one, symmetry) for one in new for symmetry in symmetries}
            new = sorted(
                (one for one in images - reached if one is not None), key=lambda run: (run.start, run.stop)
            )
            reached.update(new)
        first.update(dict.fromkeys(reached, place))
    return first


def _candidates(devices: int) -> Iterator[Exchange]:
    """The two halves of an aligned block exchanged; all devices in reverse."""
    yield tuple(reversed(range(devices)))
    half = 1
    while 2 * half <= devices:
        for start in range(0, devices - 2 * half + 1, 2 * half):
            order = list(range(devices))
            order[start : start + 2 * half] = [
                *range(start + half, start + 2 * half),
                *range(start, start + half),
            ]
            yield tuple(order)
        half *= 2


def _is_symmetry(problem: Problem, exchange: Exchange) -> bool:
    """Whether memory and every option's places stay what they are."""
    if any(problem.memory_bytes[device] != problem.memory_bytes[to] for device, to in enumerate(exchange)):
        return False
    runs = {option.places for call in problem.calls for option in call.options}
    return all({_image(place, exchange) for place in places} == {*places} for places in runs)


def _image(place: range, exchange: Exchange) -> range | None:
    """Where a run of devices goes; None if it is a run no more."""
    if not place:
        return place
    to = sorted(exchange[device] for device in place)
    return range(to[0], to[-1] + 1) if to[-1] - to[0] + 1 == len(to) else None


def _places(call: Call) -> list[range]:
    return sorted(
        {place for option in call.options for place in option.places}, key=lambda run: (len(run), run.start)
    )
