"""Which weights the master's core moves where, and models that follow others."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from core_workers import PLACES, is_move, simulate
from scenes import grpo, place

from realflow.graph.types import Follow
from realflow.planfile.holdings import follow_edges, held_by, planned_edges
from realflow.runtime.events import Finished, Saved, StepDone
from realflow.runtime.messages import (
    DispatchDone,
    Reallocate,
)


def test_reallocation_only_where_weights_lack() -> None:
    same, _ = simulate(place(grpo(), 2, {}), 3)
    assert not any(isinstance(message, Reallocate) for message in same.taken)
    plan = place(grpo(), 3, {"rollout": (0, 1), "train": (2,)})
    apart, _ = simulate(plan, 3)
    moves = [message for message in apart.taken if isinstance(message, Reallocate)]
    assert len(moves) == 3 * 2, "three ranks take part after each step but the last"
    assert {v for _, step, v in apart.versions if step == 2} == {4}


def test_only_holdings_that_lack_weights_get_them() -> None:
    plan = place(grpo(second=2, steps=4), 4, {"greedy": (1,), "rollout": (0, 1), "train": (2,), "ref": (3,)})
    workers, _ = simulate(plan, 5)
    moves = set()
    for message in filter(is_move, workers.taken):
        edge = workers.edges[message.edge]
        moves.add(
            (message.dispatch, *(tuple(r for r, _ in side) for side in (edge.sources, edge.destinations)))
        )
    assert moves == {
        # `greedy` runs in steps 1 and 3: there it comes first, and `rollout` has the weights on rank 1.
        ("realloc:actor:greedy@v2", (2,), (1,)),
        ("realloc:actor:rollout@v2", (1, 2), (0,)),
        ("realloc:actor:rollout@v4", (2,), (0, 1)),
        ("realloc:actor:greedy@v6", (2,), (1,)),
        ("realloc:actor:rollout@v6", (1, 2), (0,)),
    }
    most: dict[str, int] = defaultdict(int)
    for dispatch, _, destinations in moves:
        call = dispatch.partition("@")[0].rpartition(":")[2]
        most[call] = max(most[call], len(destinations))
    assert {realloc.destination: realloc.bytes for realloc in plan.reallocs} == most


@pytest.mark.parametrize(
    "where", [*PLACES[6:], (4, {}, {"rollout": "p2t2", "greedy": "d2t2", "train": "d4"}, {})]
)
def test_the_core_moves_what_the_plan_foresees(where: tuple) -> None:
    """Where every call runs in every step: the same edges, after each training one of each."""
    plan = place(grpo(second=1, steps=4), *where)
    workers, told = simulate(plan, 11)
    assert isinstance(told[-1], Finished)
    foreseen = planned_edges(plan.graph, plan.calls)
    assert {(r.model, r.destination) for r in plan.reallocs} == {(e.model, e.call) for e in foreseen}
    after_training = Counter(m.edge for m in workers.taken if is_move(m) and not m.dispatch.endswith("@v0"))
    expected = Counter({edge.key: 0 for edge in foreseen})
    for edge in foreseen:
        expected[edge.key] += 3 * len(edge.ranks)
    assert after_training == expected


def test_frozen_models_never_move() -> None:
    workers, _ = simulate(place(grpo(), 4, {}, {"ref": "t4", "rollout": "t2p2"}), 3)
    assert {workers.edges[m.edge].into for m in workers.taken if is_move(m)} == {"actor"}


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3]), (2, [1, 3])])
def test_a_model_follows_another_at_the_end_of_steps(every: int, due: list[int]) -> None:
    graph = grpo(steps=4)
    ref = replace(graph.models["ref"], follows=Follow("actor", 0.9, every))
    graph = replace(graph, models={**graph.models, "ref": ref}, checkpoint_every=2)
    plan = place(graph, 4, {"train": (0, 1), "ref": (2, 3)}, {"train": "p2", "ref": "t2"})
    workers, told = simulate(plan, 5)
    assert isinstance(told[-1], Finished)
    (edge,) = [e for e in workers.edges.values() if e.into == "ref"]
    assert (edge.model, edge.decay, edge.key) == ("actor", 0.9, follow_edges(graph, plan.calls)[0].key)
    assert set(edge.destinations) == held_by(plan.calls["ref"])
    assert set(edge.sources) == held_by(plan.calls["train"])
    names = [getattr(m, "dispatch", "") for m in workers.taken]
    followed = list(dict.fromkeys(name for name in names if name.startswith("realloc:ref")))
    assert followed == [f"realloc:ref:actor@{step}" for step in due]
    assert all(message.order > 0 for message in workers.taken if is_move(message))
    for step in due:  # after the step's own calls of both models, before the next step's and the checkpoint
        at = names.index(f"realloc:ref:actor@{step}")
        assert max(names.index(f"{call}@{step}") for call in ("train", "ref")) < at
        if step + 1 < 4:
            assert at < names.index(f"ref@{step + 1}")
        if step % 2:
            assert at < names.index(f"save:ref@{step}") and f"save:actor@{step}" in names


@pytest.mark.parametrize("seed", range(12))
def test_a_step_is_told_of_when_what_follows_at_its_end_has_followed(seed: int) -> None:
    """Its seconds end before, with its calls; the next step has begun, and its checkpoint comes after."""
    graph = grpo(steps=4)
    ref = replace(graph.models["ref"], follows=Follow("actor", 0.9))
    graph = replace(graph, models={**graph.models, "ref": ref}, checkpoint_every=2)
    plan = place(graph, 4, {"train": (0, 1), "ref": (2, 3)}, {"train": "p2", "ref": "t2"})
    history: list[object] = []
    simulate(plan, seed, history=history)
    steps = [told for told in history if isinstance(told, StepDone)]
    assert [told.step for told in steps] == [0, 1, 2, 3]
    assert all(early.started < early.ended <= late.started for early, late in pairwise(steps))
    for told in steps:
        followed = [
            at
            for at, event in enumerate(history)
            if isinstance(event, DispatchDone) and event.dispatch == f"realloc:ref:actor@{told.step}"
        ]
        assert len(followed) == 4 and max(followed) < history.index(told)
    saved = {told.step: at for at, told in enumerate(history) if isinstance(told, Saved)}
    assert sorted(saved) == [1, 3] and all(history.index(steps[step]) < at for step, at in saved.items())


def test_a_follower_with_several_holdings_on_a_rank_has_an_edge_for_each() -> None:
    graph = grpo(probe="ref")
    ref = replace(graph.models["ref"], follows=Follow("actor", 0.9))
    graph = replace(graph, models={**graph.models, "ref": ref})
    plan = place(graph, 2, {}, {"ref": "t2", "probe": "p2"})
    workers, told = simulate(plan, 5)
    assert isinstance(told[-1], Finished)
    names = [m.dispatch for m in workers.taken if is_move(m) and m.dispatch.startswith("realloc:ref")]
    assert names == [
        f"realloc:ref:actor{turn}@{step}" for step in (0, 1, 2) for turn in ("", ".1") for _ in "ab"
    ]
    edges = [edge for edge in workers.edges.values() if edge.into == "ref"]
    assert [set(edge.destinations) for edge in edges] == [held_by(plan.calls[c]) for c in ("ref", "probe")]
