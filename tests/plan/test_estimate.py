"""What a plan costs wherever it comes from, what its step hangs on, and what would shorten it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_scenes import cpus, gpus, models, shipped

from planner.critical import FASTER, advice, critical_path, faster_ways, gains, idle_groups, path_words
from planner.estimate import GIVEN, Estimate, differences, estimate, with_estimate
from planner.memory import rank_memory, with_memory
from planner.options import Ask
from planner.options.pins import parse_pins
from planner.search import MOVE, Work, evaluate
from planner.searched import search_plan
from realflow.graph.types import Follow, Graph
from realflow.layout import Layout
from realflow.planfile import CallPlan, Cluster, Plan
from realflow.planfile.check import ENGINES_OF
from realflow.planfile.lanes import lanes

WORK = Work(solver=2.0, rounds=500)
GRPO = shipped("grpo", "prompts=8", "samples=2", "max_new_tokens=64")
PPO = shipped("ppo", "prompts=8", "max_new_tokens=64")
AVERAGE = replace(
    GRPO, models={**GRPO.models, "ref": replace(GRPO.models["ref"], follows=Follow("actor", 0.9))}
)


@lru_cache
def searched(name: str) -> Plan:
    """A plan that was searched, as a name says."""
    graph, cluster, fixed = {
        "grpo": (GRPO, cpus(2), {}),
        "ppo": (PPO, gpus(1, 4), {}),
        "apart": (GRPO, gpus(1, 4), {"rollout": "t2@0-1", "train": "d2@2-3:offload", "ref": "d1@0"}),
        "freed": (PPO, gpus(1, 4), {"rollout": "t2@0-1:free", "train": "d2t2@0-3", "values": "d2@2-3:free"}),
        "average": (AVERAGE, gpus(1, 4), {"ref": "t2@2-3", "train": "d4@0-3"}),
        "asynchronous": (replace(GRPO, max_staleness=1), gpus(1, 4), {}),
    }[name]
    ask = Ask(pins=parse_pins(fixed, len(cluster.devices)))
    return search_plan(models(graph), cluster, ask, work=WORK)


NAMES = ("grpo", "ppo", "apart", "freed", "average", "asynchronous")


def estimated(plan: Plan) -> Estimate:
    return estimate(plan, models(plan.graph).decoders)


def by_hand(graph: Graph, cluster: Cluster, **given: tuple[str, tuple[int, ...]]) -> Plan:
    """A plan as a person writes it; calls that are not given run on all ranks."""
    world = tuple(range(len(cluster.devices)))
    calls = {}
    for call in graph.calls:
        layout, ranks = given.get(call.name, (f"d{len(world)}", world))
        calls[call.name] = CallPlan(ranks, Layout.parse(layout), ENGINES_OF[call.op][0])
    return Plan(graph, cluster, calls, notes=(GIVEN,))


# ---- seconds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_searched_plan_is_estimated_as_it_was_found(name: str) -> None:
    plan = searched(name)
    found = estimated(plan)
    assert found.step_seconds == pytest.approx(plan.step_seconds, rel=1e-9)
    assert with_estimate(plan, found) is plan


@pytest.mark.parametrize("name", ["grpo", "ppo", "apart"])
def test_an_edited_plan_says_what_is_other(name: str) -> None:
    plan = searched(name)
    how = plan.calls["ref"]
    edited = replace(plan, calls={**plan.calls, "ref": replace(how, micro_batch_tokens=64)})
    found = estimated(edited)
    anew = with_estimate(edited, found)
    assert anew.calls["ref"].predicted_seconds == found.costs["ref"].seconds
    assert (anew.calls["ref"].predicted_seconds or 0) > 1.02 * (how.predicted_seconds or 0)
    assert anew.calls["train"].predicted_seconds == pytest.approx(plan.calls["train"].predicted_seconds)
    assert (anew.lower_bound_seconds, anew.gap) == (None, None)
    (note,) = differences(edited, anew)
    assert "another" not in note
    other = replace(edited, hashes={"catalogue": "0" * 16})
    assert "estimated anew, with another catalogue:" in differences(other, anew)[0]
    assert "estimated anew" in note and "ref " in note and "train " not in note and note in anew.notes
    assert not any(one.startswith("Search:") for one in anew.notes)


def test_a_given_plan_gets_seconds() -> None:
    plan = by_hand(PPO, gpus(1, 4), rollout=("t2", (0, 1)), train=("d2", (2, 3)))
    anew = with_estimate(plan, estimated(plan))
    assert anew.step_seconds and anew.timeline and GIVEN not in anew.notes
    assert all(how.predicted_seconds is not None for how in anew.calls.values())
    assert any(entry.what == "move:rollout" and entry.ranks == (0, 1, 2, 3) for entry in anew.timeline)
    assert anew.hashes["catalogue"] and "seconds are not estimated" not in " ".join(anew.notes)
    assert with_estimate(anew, estimated(anew)) is anew


def test_ranks_that_are_no_run_are_numbered_anew() -> None:
    """Calls on ranks 0 and 2, and on 1 and 3, run side by side: as on 0-1 and 2-3."""
    apart = by_hand(PPO, gpus(1, 4), ref=("d2", (0, 2)), reward=("d2", (1, 3)), values=("d2", (0, 2)))
    beside = by_hand(PPO, gpus(1, 4), ref=("d2", (0, 1)), reward=("d2", (2, 3)), values=("d2", (0, 1)))
    one, other = estimated(apart), estimated(beside)
    assert one.step_seconds == pytest.approx(other.step_seconds, rel=1e-9)
    assert sorted(one.ranks) == [0, 1, 2, 3] and not one.notes
    ref = next(entry for entry in one.timeline.entries if entry.what == "ref")
    assert one.ranks_of(ref) == (0, 2)
    ring = [("ref", (0, 1)), ("reward", (1, 2)), ("values", (2, 3)), ("rollout", (0, 3))]
    spread = estimated(by_hand(PPO, gpus(1, 4), **{name: ("d2", ranks) for name, ranks in ring}))
    assert spread.notes, "no numbering makes runs of a ring"


def test_kinds_of_devices_have_their_own_seconds() -> None:
    both = Cluster((*gpus(1, 4).nodes, *gpus(1, 4, "a100-80gb").nodes))
    both = Cluster(tuple(replace(node, name=f"n{i}") for i, node in enumerate(both.nodes)))
    fast = estimated(by_hand(GRPO, both, train=("d4", (0, 1, 2, 3))))
    slow = estimated(by_hand(GRPO, both, train=("d4", (4, 5, 6, 7))))
    assert fast.costs["train"].parts["compute"] < 0.9 * slow.costs["train"].parts["compute"]


# ---- the critical path -----------------------------------------------------------------------------------

PLACES: Mapping[int, tuple[tuple[int, ...], ...]] = {
    1: ((0,), (1,), (2,), (3,)),
    2: ((0, 1), (2, 3)),
    4: ((0, 1, 2, 3),),
}
HOW = st.sampled_from(["d1", "d2", "t2", "p2", "d4", "d2t2", "d2p2", "t2p2"]).flatmap(
    lambda text: st.tuples(st.just(text), st.sampled_from(PLACES[Layout.parse(text).size]))
)


@given(st.lists(HOW, min_size=6, max_size=6))
@settings(max_examples=25, deadline=None)
def test_the_path_reaches_from_begin_to_end(hows: list[tuple[str, tuple[int, ...]]]) -> None:
    names = [call.name for call in PPO.calls if call.model]
    found = estimated(by_hand(PPO, gpus(1, 4), **dict(zip(names, hows, strict=True))))
    path = critical_path(found)
    assert path[0].entry.start == 0.0 and path[0].waited == "begin"
    assert path[-1].entry.end == found.timeline.makespan
    for before, link in pairwise(path):
        assert link.entry.start == pytest.approx(before.entry.end, rel=1e-9)
        assert link.of == before.entry.what
        if link.waited == "weights":
            assert link.of.startswith(MOVE)
        if link.waited == "devices":
            assert set(found.ranks_of(link.entry)) & set(found.ranks_of(before.entry))
    assert len(path_words(found)) == len(path) + 1  # and bookkeeping
    gained = {gain.what: gain.seconds for gain in gains(found)}
    lengths = {entry.what: entry.end - entry.start for entry in found.timeline.entries}
    on_path = {link.entry.what for link in path}
    for what, seconds in gained.items():
        assert -1e-12 <= seconds <= FASTER * lengths[what] * (1 + 1e-6)
        assert seconds <= 1e-9 or what in on_path, "what is beside the path gains nothing"


@pytest.mark.parametrize("name", NAMES)
def test_the_path_of_searched_plans(name: str) -> None:
    found = estimated(searched(name))
    path = critical_path(found)
    seconds = sum(link.entry.end - link.entry.start for link in path)
    assert seconds == pytest.approx(found.timeline.makespan) and advice(
        found, models(found.plan.graph).decoders
    )


def test_gains_are_what_evaluate_says() -> None:
    found = estimated(searched("apart"))
    for gain in gains(found):
        if gain.what.startswith(MOVE):
            continue
        calls = tuple(
            replace(
                call,
                options=(
                    replace(
                        call.options[0],
                        seconds=call.options[0].seconds * 0.9,
                        offload_seconds=call.options[0].offload_seconds * 0.9,
                    ),
                ),
            )
            if call.name == gain.what
            else call
            for call in found.problem.calls
        )
        anew = evaluate(replace(found.problem, calls=calls), found.choice, found.order)
        assert gain.seconds == pytest.approx(found.timeline.makespan - anew.makespan, abs=1e-12)
    assert any(gain.what == "move:rollout" and gain.seconds > 0 for gain in gains(found))


@pytest.mark.parametrize("name", NAMES)
def test_idle_and_busy_make_a_step(name: str) -> None:
    found = estimated(searched(name))
    groups = idle_groups(found)
    assert sorted(rank for group in groups for rank in group.ranks) == list(range(found.plan.world_size))
    for group in groups:
        busy = sum(
            entry.end - entry.start
            for entry in found.timeline.entries
            if entry.devices and group.ranks[0] in found.ranks_of(entry)
        )
        assert busy + group.idle == pytest.approx(found.step_seconds)
        assert group.idle > -1e-9
    drawn = lanes(with_estimate(found.plan, found))
    assert {lane.ranks for lane in drawn if lane.ranks} == {group.ranks for group in groups}


def test_memory_that_binds_is_named() -> None:
    """The same plan on devices with much and with little memory."""
    said = {}
    for name, size in (("much", 80 << 30), ("little", 3 << 30)):
        cluster = gpus(1, 2, memory=size)
        plan = by_hand(shipped("grpo", "prompts=64", "samples=8", "max_new_tokens=1024"), cluster)
        plan = replace(
            plan,
            calls={name: replace(how, slots=4, micro_batch_tokens=1024) for name, how in plan.calls.items()},
        )
        decoders = models(plan.graph, num_hidden_layers=16, hidden_size=1024, head_dim=128).decoders
        memory = rank_memory(plan.graph, plan.calls, {}, cluster, Ask().assume, decoders=decoders)
        found = estimate(with_memory(plan, memory), decoders)
        said[name] = (
            " ".join(advice(found, decoders)),
            {way.call: way for way in faster_ways(found, decoders)},
        )
    rollout = {name: ways["rollout"] for name, (_, ways) in said.items()}
    assert rollout["much"].fits and not rollout["little"].fits
    assert rollout["much"].way.slots > 4 and rollout["much"].bytes > 0
    assert "Memory binds" not in said["much"][0] and "Memory binds" in said["little"][0]
    assert "If rollout took 10% less, a step would be" in said["much"][0]
