"""What a plan costs: the one definition that search, bound, enumerator and simulator share.

A step is one period of a cycle. It begins with every trained model's weights in the layout of its train
call, and ends when all its operations have ended; the next begins then. Operations are the calls and the
moves of weights. In the given order, each starts as soon as what it waits for has ended and its devices are
free of everything that comes before it in the order.

- A call waits for the calls that it comes `after`.
- A trained model's call whose layout and place are not those of the train call needs its weights moved there:
  once a step for each layout and place where some call `keeps` them, else right before every call. A move
  takes the devices of both; it comes after nothing (weights are ready when the step begins) and before every
  call that needs it.
- A follower's weights move when its leader's train call and all calls of the follower have ended.
- With `overlap` above 1 an operation may work on an older step: a call at stage s in the period k works on
  the samples of step k - s. What a call comes after is at no later stage; within one stage it waits, across
  stages the end of a period has waited for it. So the samples that are trained on are as many versions old
  as the train call's stage, less than `overlap`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planner.search.problem import (
    MOVE,
    Call,
    Choice,
    Entry,
    Move,
    Option,
    Order,
    Placed,
    Problem,
    Slot,
    Timeline,
)

Holding = tuple[str, str, int, int]
"""Model (or call, where it has none), layout, and the run of devices."""


@dataclass(frozen=True)
class Operation:
    """A call or a move: `after` are operations that must have ended, `before` calls that must not start."""

    what: str
    devices: tuple[range, ...]
    seconds: float
    after: tuple[str, ...]


def chosen(problem: Problem, choice: Choice, name: str) -> Option:
    """The option of a call."""
    return problem.call(name).options[choice[name].option]


def holding(call: Call, placed: Placed) -> Holding:
    """What a call holds, and where: equal for calls that share it."""
    place = placed.place
    return (call.model or call.name, call.options[placed.option].layout, place.start, place.stop)


def operations(problem: Problem, choice: Choice) -> dict[str, Operation]:
    """Name -> operation: every call, and every move that the choice needs."""
    found = {
        call.name: Operation(
            call.name,
            _runs(choice[call.name].place),
            call.options[choice[call.name].option].duration,
            call.after,
        )
        for call in problem.calls
    }
    moves = [*_moves(problem, choice), *_following(problem, choice)]
    return {**found, **{move.what: move for move in moves}}


def needs(problem: Problem, choice: Choice) -> dict[str, str]:
    """Call -> the move that brings its weights, for calls that need one."""
    found: dict[str, str] = {}
    for users in _moved(problem, choice).values():
        kept = is_kept(problem, choice, users[0])
        for name in users:
            found[name] = MOVE + (users[0] if kept else name)
    return found


def evaluate(problem: Problem, choice: Choice, order: Order) -> Timeline:
    """The timeline of a choice and an order. Fails (AssertionError) where the order breaks what calls wait
    for, lacks a call or names one twice; whether it fits into memory is `misfits`' to say."""
    todo, need = operations(problem, choice), needs(problem, choice)
    calls = problem_calls(problem)
    stages = {slot.what: slot.stage for slot in order if slot.what in calls}
    entries: list[Entry] = []
    ended: dict[str, float] = {}
    free: defaultdict[int, float] = defaultdict(float)

    def place(slot: Slot) -> None:
        operation = todo.pop(slot.what)
        waits = [_ended(before, slot, stages, ended) for before in operation.after]
        if slot.what in need:
            waits.append(ended[need[slot.what]])
        ready = max((*waits, *(free[device] for run in operation.devices for device in run)), default=0.0)
        end = ready + operation.seconds
        for run in operation.devices:
            for device in run:
                free[device] = end
        ended[slot.what] = end
        entries.append(Entry(slot.what, operation.devices, ready, end, slot.stage))

    late = {MOVE + name for name in need if not is_kept(problem, choice, name)}
    for slot in order:
        assert slot.what not in late, f"{slot.what} brings what is freed: it comes right before its call"
        assert slot.what in todo, f"{slot.what} is no operation of this choice, or comes twice"
        assert 0 <= slot.stage < problem.overlap, slot
        move = need.get(slot.what)
        if move in todo:
            place(Slot(move, slot.stage))
        place(slot)
    for what in [what for what in todo if what.startswith(MOVE)]:  # into followers, at the end
        place(Slot(what, max(stages.values(), default=0)))
    assert not todo, f"the order lacks {sorted(todo)}"
    return Timeline(tuple(entries), max((entry.end for entry in entries), default=0.0))


def misfits(problem: Problem, choice: Choice) -> dict[int, int]:
    """Device -> bytes that it lacks, for those that lack any."""
    static: dict[Holding, int] = {}
    for call in problem.calls:
        held = holding(call, choice[call.name])
        static[held] = max(static.get(held, 0), chosen(problem, choice, call.name).static_bytes)
    need: defaultdict[int, int] = defaultdict(int)
    for (_, _, start, stop), size in static.items():
        for device in range(start, stop):
            need[device] += size
    active: defaultdict[int, int] = defaultdict(int)
    for call in problem.calls:
        option = chosen(problem, choice, call.name)
        for device in choice[call.name].place:
            need[device] += option.own_bytes
            active[device] = max(active[device], option.active_bytes)
    lacks = {
        device: need[device] + active[device] - problem.memory_bytes[device]
        for device in sorted({*need, *active})
    }
    return {device: size for device, size in lacks.items() if size > 0}


def problem_calls(problem: Problem) -> set[str]:
    """The names of its calls."""
    return {call.name for call in problem.calls}


def move_seconds(move: Move, source: range, destination: range) -> float:
    """Seconds of a move between two runs of devices."""
    within = not destination or (source.start <= destination.start and destination.stop <= source.stop)
    return move.inside if within else move.apart


def is_kept(problem: Problem, choice: Choice, name: str) -> bool:
    """Whether some call that shares what a call holds keeps it."""
    held = holding(problem.call(name), choice[name])
    sharing = (call for call in problem.calls if holding(call, choice[call.name]) == held)
    return any(chosen(problem, choice, call.name).keeps for call in sharing)


def _ended(before: str, slot: Slot, stages: Mapping[str, int], ended: Mapping[str, float]) -> float:
    """When what an operation comes after has ended, as far as this period must wait for it."""
    stage = stages[before]
    assert stage <= slot.stage, f"{slot.what} works on a newer step than {before}, which it comes after"
    if stage < slot.stage:
        return 0.0
    assert before in ended, f"{slot.what} comes before {before} in the order, but after it in the graph"
    return ended[before]


def _moved(problem: Problem, choice: Choice) -> dict[Holding, list[str]]:
    """What a trained model's weights must be moved into -> the calls that need it, in the problem's order."""
    trained = problem.trained()
    home = {model: holding(train, choice[train.name]) for model, train in trained.items()}
    found: defaultdict[Holding, list[str]] = defaultdict(list)
    for call in problem.calls:
        if call.model in trained and not call.trains:
            held = holding(call, choice[call.name])
            if held != home[call.model]:
                found[held].append(call.name)
    return found


def _moves(problem: Problem, choice: Choice) -> Iterable[Operation]:
    trained = problem.trained()
    for (model, layout, start, stop), users in _moved(problem, choice).items():
        train = trained[model]
        source = choice[train.name].place
        kept = is_kept(problem, choice, users[0])
        cost = problem.moves[model, chosen(problem, choice, train.name).layout, layout]
        for name in users[:1] if kept else users:
            seconds = move_seconds(cost, source, range(start, stop))
            yield Operation(MOVE + name, _union(source, range(start, stop)), seconds, ())


def _following(problem: Problem, choice: Choice) -> Iterable[Operation]:
    trained = problem.trained()
    for model, leader in problem.follows.items():
        train = trained[leader]
        source = choice[train.name].place
        mine = [call for call in problem.calls if call.model == model]
        into = {holding(call, choice[call.name]): call.name for call in reversed(mine)}
        for (_, layout, start, stop), name in reversed(into.items()):
            cost = problem.moves[model, chosen(problem, choice, train.name).layout, layout]
            seconds = move_seconds(cost, source, range(start, stop))
            after = (train.name, *(call.name for call in mine))
            yield Operation(MOVE + name, _union(source, range(start, stop)), seconds, after)


def _runs(*runs: range) -> tuple[range, ...]:
    return tuple(run for run in runs if len(run))


def _union(one: range, other: range) -> tuple[range, ...]:
    """The devices of either, as runs that do not overlap."""
    if one.stop < other.start or other.stop < one.start:
        return _runs(*sorted((one, other), key=lambda run: run.start))
    return _runs(range(min(one.start, other.start), max(one.stop, other.stop)))
