"""Random problems that are small enough to enumerate, and random plans of them."""

from __future__ import annotations

import random
from dataclasses import replace

from planner.search.problem import MOVE, Call, Choice, Move, Option, Order, Placed, Problem, Slot

CHOICES = 2000
LAYOUTS = "abc"


def places(nodes: int, width: int, size: int) -> tuple[range, ...]:
    """Aligned blocks inside nodes of `width` devices, and runs of whole nodes."""
    if size == 0:
        return (range(0),)
    if size <= width:
        return tuple(range(start, start + size) for start in range(0, nodes * width, size))
    return tuple(range(node * width, node * width + size) for node in range(nodes - size // width + 1))


def random_problem(seed: int, *, most: int = CHOICES) -> Problem:
    """A problem of 2 to 4 calls on 2 to 8 devices, with at most `most` choices (fewer where steps
    overlap)."""
    rng = random.Random(seed)
    width = rng.choice((1, 2, 2, 4))
    nodes = rng.choice({1: (2, 3, 4), 2: (1, 2, 2, 3), 4: (1, 2)}[width])
    overlap = rng.choice((1, 1, 1, 2, 3))
    count = rng.choice((2, 3, 3, 4) if overlap == 1 else (2, 2, 3))
    calls = _cut(rng, _calls(rng, count, width, nodes), most if overlap == 1 else most // 8)
    follows = {"copy": "actor"} if any(call.trains for call in calls) else {}
    moves = {
        (model, one, other): _move(rng) for model in ("actor", "copy") for one in LAYOUTS for other in LAYOUTS
    }
    tight = rng.choice((8, 12, 20, 60))
    memory = [tight + rng.choice((0, 0, 5)) if rng.random() < 0.2 else tight for _ in range(nodes * width)]
    if rng.random() < 0.7:
        memory = [tight] * (nodes * width)
    return Problem(tuple(memory), calls, moves, follows, overlap)


def random_choice(rng: random.Random, problem: Problem) -> Choice:
    """Any option at any place for each call."""
    chosen = {}
    for call in problem.calls:
        index = rng.randrange(len(call.options))
        chosen[call.name] = Placed(index, rng.choice(call.options[index].places))
    return chosen


def random_order(rng: random.Random, problem: Problem, moves: list[str]) -> Order:
    """An order that keeps what calls wait for, `moves` among them anywhere before the calls that need them
    (which the caller sees to)."""
    stages: dict[str, int] = {}
    for call in problem.calls:  # calls come after earlier ones only
        low = max((stages[before] for before in call.after), default=0)
        stages[call.name] = rng.randrange(low, problem.overlap)
    left = {call.name: [b for b in call.after if stages[b] == stages[call.name]] for call in problem.calls}
    order: list[Slot] = []
    while left:
        name = rng.choice([name for name, waits in left.items() if not any(w in left for w in waits)])
        del left[name]
        order.append(Slot(name, stages[name]))
    for move in moves:
        users = [place for place, slot in enumerate(order) if slot.what == move.removeprefix(MOVE)]
        order.insert(rng.randrange(users[0] + 1), Slot(move))
    return tuple(order)


def _calls(rng: random.Random, count: int, width: int, nodes: int) -> list[Call]:
    trainer = rng.randrange(count) if rng.random() < 0.75 else None
    calls: list[Call] = []
    for index in range(count):
        if index == trainer:
            model: str | None = "actor"
        elif trainer is None:
            model = rng.choice(("shared", "shared", "other", None))
        else:
            model = rng.choice(("actor", "actor", "copy", "shared", None))
        after = tuple(call.name for call in calls if rng.random() < 0.5)
        options = tuple(_option(rng, width, nodes, model) for _ in range(rng.randint(1, 4)))
        calls.append(Call(f"call{index}", options, after, model, index == trainer))
    return calls


def _option(rng: random.Random, width: int, nodes: int, model: str | None) -> Option:
    sizes = [size for size in (1, 2, 4) if size <= width] + [width * runs for runs in range(2, nodes + 1)]
    size = rng.choice(sizes) if model or rng.random() < 0.7 else 0
    seconds = float(rng.randint(1, 12)) if rng.random() < 0.5 else rng.uniform(0.0, 12.0)
    return Option(
        places=places(nodes, width, size),
        seconds=seconds / max(1, size) ** 0.7,
        static_bytes=rng.choice((0, 1, 3, 6)),
        active_bytes=rng.choice((0, 2, 5)),
        own_bytes=rng.choice((0, 0, 0, 2)),
        layout=rng.choice(LAYOUTS),
        keeps=rng.random() < 0.6,
        offload_seconds=rng.choice((0.0, 0.0, 0.5)),
    )


def _cut(rng: random.Random, calls: list[Call], most: int) -> tuple[Call, ...]:
    """Fewer places and options until there are at most `most` choices."""

    def pairs(call: Call) -> int:
        return sum(len(option.places) for option in call.options)

    while True:
        total = 1
        for call in calls:
            total *= pairs(call)
        if total <= most:
            return tuple(calls)
        index = max(range(len(calls)), key=lambda one: pairs(calls[one]))
        call = calls[index]
        options = list(call.options)
        dropped = rng.randrange(len(options))
        if len(options) > 1:
            del options[dropped]
        else:
            kept = rng.sample(options[0].places, len(options[0].places) - 1)
            options[0] = _at(options[0], tuple(sorted(kept, key=lambda run: run.start)))
        calls[index] = Call(call.name, tuple(options), call.after, call.model, call.trains)


def _at(option: Option, runs: tuple[range, ...]) -> Option:
    return replace(option, places=runs)


def _move(rng: random.Random) -> Move:
    return Move(rng.choice((0.0, rng.uniform(0, 2))), rng.uniform(0, 4))
