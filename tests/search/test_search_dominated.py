"""What is dropped is needed by no shortest plan."""

from __future__ import annotations

import random
from dataclasses import replace

import enumerator
import pytest
import random_problems

from planner.search import Call, Move, Option, Problem, evaluate, misfits
from planner.search.dominated import undominated


def crowded(seed: int) -> Problem:
    """A random problem in which many options differ in little."""
    rng = random.Random(seed)
    problem = random_problems.random_problem(seed, most=300)

    def worse(option: Option) -> Option:
        return replace(
            option,
            seconds=option.seconds + rng.choice((0.0, 0.0, 1.0)),
            static_bytes=option.static_bytes + rng.choice((-1, 0, 1)) * (option.static_bytes > 0),
            own_bytes=option.own_bytes + rng.choice((0, 1)),
            layout=rng.choice((option.layout, *random_problems.LAYOUTS)),
            keeps=rng.random() < 0.5,
        )

    calls = []
    for index, call in enumerate(problem.calls):
        extra = tuple(worse(option) for option in call.options) if index < 2 else ()
        calls.append(replace(call, options=call.options + extra))
    moves = {key: Move(min(cost.inside, 1.0), 1.0 + cost.apart / 8) for key, cost in problem.moves.items()}
    return replace(problem, calls=tuple(calls), moves=moves if seed % 2 else problem.moves)


def check(seed: int) -> int:
    problem = crowded(seed)
    reduced = undominated(problem)
    best, left = enumerator.best_plan(problem), enumerator.best_plan(reduced.problem)
    assert (best is None) == (left is None), seed
    if best is not None and left is not None:
        assert left.seconds == pytest.approx(best.seconds, rel=1e-9), seed
        choice = reduced.whole(left.choice)
        assert evaluate(problem, choice, left.order).makespan == pytest.approx(best.seconds, rel=1e-9)
        assert not misfits(problem, choice)
        assert reduced.reduced(choice) == left.choice
    return _pairs(problem) - _pairs(reduced.problem)


def _pairs(problem: Problem) -> int:
    return sum(len(option.places) for call in problem.calls for option in call.options)


def test_the_shortest_step_stays() -> None:
    dropped = [check(seed) for seed in range(60)]
    assert sum(one > 0 for one in dropped) > 30


@pytest.mark.full
@pytest.mark.parametrize("start", range(2000, 2600, 100))
def test_the_shortest_step_stays_often(start: int) -> None:
    for seed in range(start, start + 100):
        check(seed)


def test_a_smaller_mesh_does_where_nothing_moves() -> None:
    small, large = Option((range(1), range(1, 2)), 2.0), Option((range(2),), 3.0)
    problem = Problem((9, 9), (Call("reward", (large, small)),))
    assert undominated(problem).kept == {"reward": (1,)}
    trained = Problem(
        (9, 9), (Call("train", (large, small), (), "actor", True), Call("use", (small,), (), "actor"))
    )
    assert undominated(trained).kept["train"] == (0, 1)


def test_what_others_may_share_stays() -> None:
    fast, shared = Option((range(1),), 1.0, 1, layout="a"), Option((range(1),), 2.0, 1, layout="b")
    user = Call("other", (Option((range(1),), 1.0, 1, layout="b"),), (), "model")
    problem = Problem((9,), (Call("one", (fast, shared), (), "model"), user))
    assert undominated(problem).kept["one"] == (0, 1)
    alone = replace(problem, calls=problem.calls[:1])
    assert undominated(alone).kept["one"] == (0,)


def test_places_that_are_too_small_for_an_option_go() -> None:
    option = Option((range(1), range(1, 2)), 1.0, 3, 3, own_bytes=1)
    reduced = undominated(Problem((6, 7), (Call("one", (option,)),)))
    assert reduced.problem.calls[0].options[0].places == (range(1, 2),)
    assert undominated(Problem((6, 6), (Call("one", (option,)),))).problem.calls[0].options == (option,)
