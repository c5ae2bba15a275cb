"""What a plan costs: `evaluate` against the enumerator's own arithmetic, and the rules one by one."""

from __future__ import annotations

import random
from itertools import pairwise

import enumerator
import pytest
import random_problems

from planner.search import MOVE, Call, Move, Option, Placed, Problem, Slot, evaluate, misfits

ALL = (range(2),)


@pytest.mark.parametrize("start", range(0, 200, 100))
def test_evaluate_means_what_the_enumerator_means(start: int) -> None:
    for seed in range(start, start + 100):
        problem = random_problems.random_problem(seed)
        rng = random.Random(seed)
        for _ in range(10):
            choice = random_problems.random_choice(rng, problem)
            work = enumerator.pieces(problem, choice)
            free = [
                name for name, one in work.items() if name.startswith(MOVE) and not (one.glued or one.waits)
            ]
            users = {move: [name for name, one in work.items() if one.weights == move] for move in free}
            named = [move for move in free if len(users[move]) == 1 and rng.random() < 0.5]
            order = random_problems.random_order(rng, problem, named)
            timeline = evaluate(problem, choice, order)
            assert timeline.makespan == pytest.approx(
                enumerator.step_seconds(problem, choice, order), rel=1e-12
            )
            assert {entry.what for entry in timeline.entries} == set(work)
            assert max(misfits(problem, choice).values(), default=0) == enumerator.shortage(problem, choice)


def test_devices_run_one_operation_at_a_time() -> None:
    for seed in range(60):
        problem = random_problems.random_problem(seed)
        rng = random.Random(seed)
        choice = random_problems.random_choice(rng, problem)
        entries = evaluate(problem, choice, random_problems.random_order(rng, problem, [])).entries
        for device in range(problem.devices):
            mine = sorted((e.start, e.end) for e in entries if any(device in run for run in e.devices))
            assert all(one[1] <= other[0] for one, other in pairwise(mine))


def trained(rollout: Option, *, overlap: int = 1) -> Problem:
    train = Option((range(2),), 4.0, layout="a")
    calls = (
        Call("rollout", (rollout,), model="actor"),
        Call("train", (train,), ("rollout",), "actor", trains=True),
    )
    return Problem((100, 100), calls, {("actor", "a", "b"): Move(1.0, 2.0)}, overlap=overlap)


FIRST = {"rollout": Placed(0, range(1)), "train": Placed(0, range(2))}
ORDER = (Slot("rollout"), Slot("train"))


def test_weights_move_in_the_step_itself() -> None:
    problem = trained(Option((range(1),), 3.0, layout="b"))
    timeline = evaluate(problem, FIRST, ORDER)
    assert [entry.what for entry in timeline.entries] == ["move:rollout", "rollout", "train"]
    assert timeline.makespan == 1.0 + 3.0 + 4.0


def test_offload_takes_the_devices() -> None:
    problem = trained(Option((range(1),), 3.0, layout="b", offload_seconds=0.5))
    assert evaluate(problem, FIRST, ORDER).makespan == 1.0 + 3.5 + 4.0


def test_an_older_stage_does_not_wait_but_shares_devices() -> None:
    apart = {"rollout": Placed(0, range(1)), "train": Placed(0, range(1, 3))}
    rollout, train = Option((range(1),), 3.0, layout="b"), Option((range(1, 3),), 4.0, layout="a")
    calls = (
        Call("rollout", (rollout,), model="actor"),
        Call("train", (train,), ("rollout",), "actor", True),
    )
    problem = Problem((9,) * 3, calls, {("actor", "a", "b"): Move(1.0, 2.0)}, overlap=2)
    order = (Slot("rollout"), Slot("train", 1))
    assert evaluate(problem, apart, order).makespan == 2.0 + 4.0  # the move, then both side by side
    assert evaluate(problem, apart, ORDER).makespan == 2.0 + 3.0 + 4.0
    with pytest.raises(AssertionError):
        evaluate(problem, apart, (Slot("rollout", 1), Slot("train", 0)))


def test_orders_that_break_what_calls_wait_for_are_refused() -> None:
    problem = trained(Option((range(1),), 3.0, layout="b", keeps=False))
    for order in (ORDER[::-1], ORDER[:1], (*ORDER, Slot("train")), (Slot("move:rollout"), *ORDER)):
        with pytest.raises(AssertionError):
            evaluate(problem, FIRST, order)


def test_a_destination_without_devices_is_inside() -> None:
    problem = trained(Option((range(0),), 3.0, layout="b"))
    choice = {"rollout": Placed(0, range(0)), "train": Placed(0, range(1, 2))}
    assert evaluate(problem, choice, ORDER).makespan == 1.0 + 3.0 + 4.0


def test_what_is_shared_is_held_once() -> None:
    one = Option(ALL, 1.0, static_bytes=6, active_bytes=3, layout="a")
    other = Option(ALL, 1.0, static_bytes=5, active_bytes=4, layout="a")
    elsewhere = Option(ALL, 1.0, static_bytes=5, active_bytes=4, layout="b")
    both = {"x": Placed(0, range(2)), "y": Placed(0, range(2))}
    for second, lacks in ((other, 0), (elsewhere, 5)):
        calls = (Call("x", (one,), model="m"), Call("y", (second,), model="m"))
        assert misfits(Problem((10, 20), calls), both) == ({0: lacks} if lacks else {})
