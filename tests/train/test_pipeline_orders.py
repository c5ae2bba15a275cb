"""Pipeline schedules, simulated: any number of stages and micro-batches, no processes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.engines.pipeline import SCHEDULES, Action, Kind, alive, messages, orders, simulate
from realflow.errors import InputError

STAGES, COUNTS = st.integers(1, 9), st.integers(0, 20)
TIMES = st.fixed_dictionaries({kind: st.floats(0.1, 10) for kind in "FBW"})


def all_orders(schedule: str, stages: int, count: int) -> list[list[Action]]:
    return [orders(schedule, stages, stage, count) for stage in range(stages)]


def idle(schedule: str, stages: int, count: int, seconds: dict[Kind, float]) -> float:
    """Seconds in which a stage has nothing to do; where B and W are one action, it takes as long as both."""
    split = schedule == "zero_bubble" and stages > 1
    used = seconds if split else {**seconds, "B": seconds["B"] + seconds["W"]}
    ends = simulate(all_orders(schedule, stages, count), used)
    return ends[-1].time - count * sum(seconds.values())


@settings(deadline=None)
@given(st.sampled_from(SCHEDULES), STAGES, COUNTS, TIMES)
def test_schedules_end_and_do_everything_once_in_a_legal_order(schedule, stages, count, seconds) -> None:
    """No deadlock: `simulate` raises where no stage can go on, whatever the actions take."""
    ends = simulate(all_orders(schedule, stages, count), seconds)
    when = {(end.action.kind, end.stage, end.action.micro_batch): end.time for end in ends}
    kinds = "FBW" if schedule == "zero_bubble" and stages > 1 else "FB"
    expected = {(kind, stage, i) for kind in kinds for stage in range(stages) for i in range(count)}
    assert set(when) == expected and len(ends) == len(expected)
    for (kind, stage, index), time in when.items():
        if kind == "F" and stage:
            assert time > when["F", stage - 1, index]
        if kind == "B":
            assert time > when["F", stage, index]
            assert stage == stages - 1 or time > when["B", stage + 1, index]
        if kind == "W":
            assert time > when["B", stage, index]


@given(st.sampled_from(SCHEDULES), STAGES, COUNTS)
def test_no_more_activations_are_alive_than_promised(schedule, stages, count) -> None:
    for stage in range(stages):
        order = orders(schedule, stages, stage, count)
        last: Kind = "W" if any(action.kind == "W" for action in order) else "B"
        now = most = 0
        for action in order:
            now += (action.kind == "F") - (action.kind == last)
            most = max(most, now)
        assert most == alive(schedule, stages, stage, count) <= stages


@given(st.integers(2, 9), st.integers(1, 20), TIMES)
def test_zero_bubble_is_never_slower(stages, count, seconds) -> None:
    assert idle("zero_bubble", stages, count, seconds) <= idle("1f1b", stages, count, seconds) + 1e-9


@given(st.integers(2, 9), st.integers(0, 12))
def test_zero_bubble_has_a_third_of_the_idle_time(stages, more) -> None:
    """The paper's figures for F, B and W of equal length and at least as many micro-batches as stages."""
    one: dict[Kind, float] = {"F": 1, "B": 1, "W": 1}
    assert idle("zero_bubble", stages, stages + more, one) == stages - 1
    assert idle("1f1b", stages, stages + more, one) == 3 * (stages - 1)


@settings(deadline=None)
@given(st.sampled_from((*SCHEDULES, "forward")), st.integers(2, 9), COUNTS)
def test_neighbours_agree_on_messages_that_come_into_being_in_that_order(schedule, stages, count) -> None:
    """If each pair works off its messages strictly in the agreed order, each stage still ends."""
    queues = [list(messages(schedule, stages, upper, count)) for upper in range(stages - 1)]
    both = ("F",) if schedule == "forward" else ("F", "B")
    for queue in queues:
        assert sorted(queue) == sorted(Action(kind, i) for kind in both for i in range(count))
    every, at = all_orders(schedule, stages, count), [0] * stages
    arrived: set[tuple[int, Action]] = set()  # (upper stage of the pair, message)
    sent: set[tuple[int, Action]] = set()
    while any(at[stage] < len(every[stage]) for stage in range(stages)) or any(queues):
        before = (list(at), [len(queue) for queue in queues])
        for stage in range(stages):
            while at[stage] < len(every[stage]):
                action = every[stage][at[stage]]
                waits = {"F": stage - 1, "B": stage}.get(action.kind)
                has_pair = waits is not None and 0 <= waits < stages - 1
                if has_pair and (waits, action) not in arrived:
                    break
                sent.add((stage if action.kind == "F" else stage - 1, action))
                at[stage] += 1
        for upper, queue in enumerate(queues):
            while queue and (upper, queue[0]) in sent:
                arrived.add((upper, queue.pop(0)))
        assert (list(at), [len(queue) for queue in queues]) != before, "deadlock"


def test_one_stage_and_no_micro_batches() -> None:
    assert (
        orders("zero_bubble", 1, 0, 2)
        == orders("1f1b", 1, 0, 2)
        == [
            Action("F", 0),
            Action("B", 0),
            Action("F", 1),
            Action("B", 1),
        ]
    )
    assert orders("1f1b", 4, 2, 0) == [] and messages("1f1b", 4, 1, 0) == ()
    with pytest.raises(InputError, match="schedule 'gpipe': expected one of 1f1b, zero_bubble"):
        orders("gpipe", 2, 0, 1)
    with pytest.raises(AssertionError, match="deadlock"):
        simulate([[Action("B", 0), Action("F", 0)]], {"F": 1.0, "B": 1.0, "W": 1.0})
