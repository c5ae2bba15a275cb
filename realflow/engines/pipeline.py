"""In which order a pipeline stage works on its micro-batches. Pure.

    1f1b         Narayanan et al., arXiv 2104.04473: a stage keeps `stages - stage` micro-batches alive
    zero_bubble  ZB-H1 of Qi et al., arXiv 2401.10241: the backward pass is split into input gradients
                 (B), for which the stage before waits, and weight gradients (W), which fill what would
                 be idle time. No more micro-batches are alive anywhere than `stages`, as on the first
                 stage of 1f1b. With F, B and W of equal length the idle time is a third of 1f1b's.
    forward      inference: forwards only

All stages of a replica work on the same micro-batches; replicas may have different numbers, also none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from realflow.errors import InputError

Kind = Literal["F", "B", "W"]
SCHEDULES = ("1f1b", "zero_bubble")


class Action(NamedTuple):
    """`F` forward, `B` backward (under zero_bubble of inputs alone), `W` gradients of weights."""

    kind: Kind
    micro_batch: int


def orders(schedule: str, stages: int, stage: int, micro_batches: int) -> list[Action]:
    """What `stage` does, in order. Raises InputError for an unknown schedule.

    With one stage zero_bubble is 1f1b: there is nothing to wait for.
    """
    assert 0 <= stage < stages and micro_batches >= 0, (stages, stage, micro_batches)
    if schedule == "forward":
        return [Action("F", i) for i in range(micro_batches)]
    if schedule not in SCHEDULES:
        raise InputError(f"schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    split = schedule == "zero_bubble" and stages > 1
    forwards = min(stages - stage - 1, micro_batches)  # before the first backward can come back
    found = [Action("F", i) for i in range(forwards)]
    weights = 0
    for backwards in range(micro_batches):
        if forwards < micro_batches:
            found.append(Action("F", forwards))
            forwards += 1
        found.append(Action("B", backwards))
        # A later stage holds fewer micro-batches between F and B, so that it may owe more weights.
        if split and backwards + 1 - weights > stage:
            found.append(Action("W", weights))
            weights += 1
    return found + [Action("W", i) for i in range(weights, micro_batches)] if split else found


def alive(schedule: str, stages: int, stage: int, micro_batches: int) -> int:
    """The most micro-batches whose activations a stage holds at once: from F to B (zero_bubble: to W)."""
    return min(micro_batches, stages if schedule == "zero_bubble" else stages - stage)


class Ended(NamedTuple):
    """When an action ends, in the simulation of a schedule."""

    time: float
    stage: int
    action: Action


def simulate(all_orders: Sequence[Sequence[Action]], seconds: Mapping[Kind, float]) -> list[Ended]:
    """Run the stages' orders against each other; transfers take no time. In order of ends.

    A forward waits for the stage before, a backward for the stage after. Where no stage can go on
    (a deadlock) an AssertionError names what each waits for.
    """
    last = len(all_orders) - 1
    done: dict[tuple[Kind, int, int], float] = {}
    clock, at = [0.0] * len(all_orders), [0] * len(all_orders)
    found: list[Ended] = []
    while any(at[stage] < len(order) for stage, order in enumerate(all_orders)):
        moved = False
        for stage, order in enumerate(all_orders):
            while at[stage] < len(order):
                action = order[at[stage]]
                needs = _needs(action, stage, last)
                if any(key not in done for key in needs):
                    break
                start = max([clock[stage], *(done[key] for key in needs)])
                clock[stage] = done[(action.kind, stage, action.micro_batch)] = start + seconds[action.kind]
                found.append(Ended(clock[stage], stage, action))
                at[stage] += 1
                moved = True
        assert moved, f"deadlock: {[order[i : i + 1] for order, i in zip(all_orders, at, strict=True)]}"
    return sorted(found)


def _needs(action: Action, stage: int, last: int) -> list[tuple[Kind, int, int]]:
    """`(kind, stage, micro-batch)` of what must have ended before an action starts."""
    kind, index = action
    if kind == "W":
        return [("B", stage, index)]
    if kind == "F":
        return [("F", stage - 1, index)] if stage else []
    needs: list[tuple[Kind, int, int]] = [("F", stage, index)]
    return [*needs, ("B", stage + 1, index)] if stage < last else needs


@lru_cache(maxsize=64)
def messages(schedule: str, stages: int, upper: int, micro_batches: int) -> tuple[Action, ...]:
    """What stages `upper` and `upper + 1` send each other, in the one order in which both post it:
    `F` goes down (states), `B` goes up (their gradients).

    A device that works off the messages of a pair one by one would hang if the two sides posted them
    in different orders. This is the order in which they come into being, so that none waits for a
    later one, and nothing waits in a circle.
    """
    every = [orders(schedule, stages, stage, micro_batches) for stage in range(stages)]
    ends = simulate(every, {"F": 1.0, "B": 1.0, "W": 1.0})
    return tuple(e.action for e in ends if (e.action.kind, e.stage) in (("F", upper), ("B", upper + 1)))
