"""Every plan of a small problem, by brute force: choices of options and places, stages, orders.

Written from what `planner.search.evaluate` says a plan costs, not from its code: devices are sets here, and
times come from the longest path through the pairs of operations that must not overlap. Values alone are
shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from planner.search.problem import MOVE, Call, Choice, Order, Placed, Problem, Slot


@dataclass(frozen=True)
class Piece:
    """An operation: `waits` are calls that it comes after, `weights` the move it needs, `glued` whether it
    must stand right before its call."""

    name: str
    devices: frozenset[int]
    seconds: float
    waits: tuple[str, ...] = ()
    weights: str | None = None
    glued: bool = False


@dataclass(frozen=True)
class Best:
    """The shortest step that fits, and a plan of it."""

    seconds: float
    choice: Choice
    order: Order


def pieces(problem: Problem, choice: Choice) -> dict[str, Piece]:
    """The operations of a choice."""
    option = {call.name: call.options[choice[call.name].option] for call in problem.calls}
    devices = {call.name: frozenset(choice[call.name].place) for call in problem.calls}
    trainers = {call.model: call for call in problem.calls if call.trains and call.model is not None}

    def held(call: Call) -> tuple[str, frozenset[int]]:
        return option[call.name].layout, devices[call.name]

    def moving(call: Call, train: Call) -> float:
        both = option[train.name].layout, option[call.name].layout
        cost = problem.moves[(str(call.model), *both)]
        return cost.inside if devices[call.name] <= devices[train.name] else cost.apart

    found: dict[str, Piece] = {}
    weights: dict[str, str] = {}
    for call in problem.calls:
        train = trainers.get(call.model)
        if train is None or train is call or held(call) == held(train):
            continue
        alike = [one for one in problem.calls if one.model == call.model and held(one) == held(call)]
        once = any(option[one.name].keeps for one in alike)
        first = alike[0] if once else call
        weights[call.name] = MOVE + first.name
        if first is call:
            both = devices[call.name] | devices[train.name]
            found[MOVE + call.name] = Piece(MOVE + call.name, both, moving(call, train), glued=not once)
    for follower, leader in problem.follows.items():
        train = trainers[leader]
        mine = [call for call in problem.calls if call.model == follower]
        for place, call in enumerate(mine):
            if held(call) not in [held(one) for one in mine[:place]]:
                both = devices[call.name] | devices[train.name]
                waits = (train.name, *(one.name for one in mine))
                found[MOVE + call.name] = Piece(MOVE + call.name, both, moving(call, train), waits)
    for call in problem.calls:
        one = option[call.name]
        seconds = one.seconds + one.offload_seconds
        found[call.name] = Piece(call.name, devices[call.name], seconds, call.after, weights.get(call.name))
    return found


def step_seconds(problem: Problem, choice: Choice, order: Order) -> float:
    """The makespan of a choice and an order, as a longest path."""
    work = pieces(problem, choice)
    stages = {slot.what: slot.stage for slot in order}
    sequence: list[str] = []
    for slot in order:
        move = work[slot.what].weights
        if move is not None and move not in sequence:
            sequence.append(move)
        if slot.what not in sequence:
            sequence.append(slot.what)
    last = max((stages[call.name] for call in problem.calls), default=0)
    for name in work:
        if name not in sequence:
            sequence.append(name)
            stages[name] = last
    assert sorted(sequence) == sorted(work)
    ends: dict[str, float] = {}
    for name in sequence:
        piece = work[name]
        before = [other for other in ends if work[other].devices & piece.devices]
        before += [other for other in piece.waits if stages[other] == stages[name]]
        before += [piece.weights] if piece.weights else []
        ends[name] = max((ends[other] for other in before), default=0.0) + piece.seconds
    return max(ends.values(), default=0.0)


def shortage(problem: Problem, choice: Choice) -> int:
    """Bytes that the fullest device lacks (0: it fits)."""
    worst = 0
    for device, memory in enumerate(problem.memory_bytes):
        static: dict[tuple[str, str, range], int] = {}
        active, own = 0, 0
        for call in problem.calls:
            placed = choice[call.name]
            if device in placed.place:
                option = call.options[placed.option]
                what = (
                    f"model {call.model}" if call.model else f"call {call.name}",
                    option.layout,
                    placed.place,
                )
                static[what] = max(static.get(what, 0), option.static_bytes)
                own += option.own_bytes
                active = max(active, option.active_bytes)
        worst = max(worst, sum(static.values()) + own + active - memory)
    return worst


def choices(problem: Problem) -> Iterator[Choice]:
    """Every option at every place, for all calls."""
    each = [
        [Placed(index, place) for index, option in enumerate(call.options) for place in option.places]
        for call in problem.calls
    ]
    for combination in itertools.product(*each):
        yield {call.name: placed for call, placed in zip(problem.calls, combination, strict=True)}


def best_plan(problem: Problem) -> Best | None:
    """The shortest step of all; None if nothing fits."""
    best: Best | None = None
    for choice in choices(problem):
        if shortage(problem, choice):
            continue
        work = pieces(problem, choice)
        for stages in _stagings(problem, work):
            limit = best.seconds if best else float("inf")
            found = _shortest(list(work.values()), stages, problem.devices, limit)
            if found is not None:
                order = tuple(Slot(name, stages[name]) for name in found[1] if not work[name].glued)
                best = Best(found[0], dict(choice), order)
    return best


def least_shortage(problem: Problem) -> int:
    """Bytes that the fullest device lacks in the best choice."""
    return min(shortage(problem, choice) for choice in choices(problem))


def _stagings(problem: Problem, work: dict[str, Piece]) -> Iterator[dict[str, int]]:
    staged = [name for name, piece in work.items() if not name.startswith(MOVE) or piece.waits]
    for values in itertools.product(range(problem.overlap), repeat=len(staged)):
        stages = dict.fromkeys(work, 0) | dict(zip(staged, values, strict=True))
        if all(stages[before] <= stages[name] for name in staged for before in work[name].waits):
            yield stages


def _shortest(
    work: list[Piece], stages: dict[str, int], devices: int, limit: float
) -> tuple[float, list[str]] | None:
    """The shortest of all orders below `limit`, and the order."""
    loads = [sum(piece.seconds for piece in work if device in piece.devices) for device in range(devices)]
    if max(loads, default=0.0) >= limit:
        return None
    named = {piece.name: piece for piece in work}
    blocks = [
        [piece] for piece in work if not piece.glued and not (piece.weights and named[piece.weights].glued)
    ]
    blocks += [[named[p.weights], p] for p in work if p.weights and named[p.weights].glued]
    needs = {
        piece.name: [other for other in piece.waits if stages[other] == stages[piece.name]]
        + ([piece.weights] if piece.weights else [])
        for piece in work
    }
    best: tuple[float, list[str]] | None = None

    def extend(left: list[list[Piece]], free: list[float], ended: dict[str, float], order: list[str]) -> None:
        nonlocal best, limit
        if not left:
            limit = max(ended.values(), default=0.0)
            best = (limit, order)
            return
        for index, block in enumerate(left):
            after, then = dict(ended), list(free)
            for piece in block:
                if not all(other in after for other in needs[piece.name]):
                    break
                starts = [after[other] for other in needs[piece.name]] + [then[d] for d in piece.devices]
                end = max(starts, default=0.0) + piece.seconds
                if end >= limit:
                    break
                after[piece.name] = end
                for device in piece.devices:
                    then[device] = end
            else:
                extend(left[:index] + left[index + 1 :], then, after, order + [one.name for one in block])

    extend(blocks, [0.0] * devices, {}, [])
    return best
