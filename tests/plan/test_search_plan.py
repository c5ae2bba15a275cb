"""`realflow plan` by searching: the plan of a graph on a cluster, its numbers, its refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_scenes import cpus, gpus, model_folder, models, shipped

from planner.estimate import estimate, with_estimate
from planner.hardware import catalogue
from planner.memory import overfull
from planner.options import Ask, Wishes
from planner.options.pins import parse_pins
from planner.options.refuse import resized
from planner.search import Choice, Placed, Slot, Work, evaluate
from planner.searched import plan_of, search_plan, solved
from realflow.errors import InputError
from realflow.graph.types import Graph
from realflow.planfile import Cluster, Plan, parse_plan, plan_to_yaml
from realflow.planfile.check import check_runnable, find_problems

WORK = Work(solver=2.0, rounds=500)
GRPO = shipped("grpo", "prompts=8", "samples=2", "max_new_tokens=64")
PPO = shipped("ppo", "prompts=8", "max_new_tokens=64")


def searched(graph: Graph, cluster: Cluster, *fixed: str, **ask: object) -> Plan:
    pins = parse_pins(dict(text.split("=", 1) for text in fixed), len(cluster.devices))
    return search_plan(models(graph), cluster, Ask(pins=pins, **ask), work=WORK)  # type: ignore[arg-type]


@pytest.mark.parametrize(("graph", "cluster"), [(GRPO, cpus(2)), (PPO, gpus(1, 4))])
def test_its_numbers_are_those_of_evaluate(graph: Graph, cluster: Cluster) -> None:
    ask = Ask()
    built, solution = solved(models(graph), cluster, ask, WORK)
    plan = plan_of(models(graph), cluster, ask, built, solution)
    assert find_problems(plan) == []
    timeline = evaluate(built.problem, solution.choice, solution.order)
    constant = built.costs[0].rates.constant("step").value
    assert plan.step_seconds == timeline.makespan + constant
    assert plan.lower_bound_seconds == pytest.approx(solution.bound + constant)
    assert plan.gap == solution.gap
    shown = [(entry.what, entry.start, entry.end) for entry in plan.timeline]
    assert shown == [(entry.what, entry.start, entry.end) for entry in timeline.entries]
    for call in graph.calls:
        where = plan.calls[call.name]
        assert where.predicted_seconds == built.cost(call.name, solution.choice[call.name].option).seconds
        if call.model:
            assert where.ranks == tuple(solution.choice[call.name].place)
    moved = {entry.what.removeprefix("move:") for entry in plan.timeline if entry.what.startswith("move:")}
    assert {one.destination for one in plan.reallocs} <= moved
    assert all(one.predicted_seconds is not None for one in plan.reallocs)
    assert plan.hashes == {"catalogue": catalogue().hash}
    assert not overfull(plan) and set(plan.memory) == set(range(len(cluster.devices)))
    # A control: any other option of a call that takes longer gives another makespan, or none better.
    for call in built.problem.calls:
        for index, option in enumerate(call.options):
            placed = solution.choice[call.name]
            if option.duration > 2 * call.options[placed.option].duration and placed.place in option.places:
                other: Choice = {**solution.choice, call.name: Placed(index, placed.place)}
                order = tuple(Slot(one.name) for one in built.problem.calls)
                assert evaluate(built.problem, other, order).makespan >= solution.bound


LONG = shipped("ppo", "prompts=128", "max_new_tokens=1024")
SELDOM = replace(GRPO, calls=tuple(replace(c, every=4) if c.name == "ref" else c for c in GRPO.calls))


@pytest.mark.parametrize(
    ("graph", "cluster"),
    [
        (LONG, cpus(3, 1 << 30)),
        (shipped("grpo", "prompts=64", "max_new_tokens=512"), cpus(2, 900 << 20)),
        (LONG, gpus(2, 2, memory=1600 << 20)),
        (PPO, cpus(1)),
        (SELDOM, gpus(1, 4)),
    ],
)
def test_an_estimate_of_what_was_found_is_what_was_found(graph: Graph, cluster: Cluster) -> None:
    """Also of weights that the search would free, but which are the train call's own, and put away as those
    are: the first two."""
    plan, known = searched(graph, cluster), models(graph)
    again = estimate(plan, known.decoders)
    assert again.step_seconds == pytest.approx(plan.step_seconds, rel=1e-12)
    assert with_estimate(plan, again) is plan
    if cluster in (cpus(3, 1 << 30), cpus(2, 900 << 20)):
        away = {
            name: replace(how, after="keep") for name, how in plan.calls.items() if how.after == "offload"
        }
        assert {"rollout", "train"} <= away.keys()
        other = estimate(replace(plan, calls={**plan.calls, **away}), known.decoders)
        assert other.step_seconds < plan.step_seconds * (1 - 1e-6), "a control: nothing is put away"


def test_the_same_seed_gives_the_same_file() -> None:
    first, second = (plan_to_yaml(searched(PPO, gpus(1, 4))) for _ in range(2))
    assert first == second
    assert parse_plan(first) == searched(PPO, gpus(1, 4))


def test_calls_that_are_fixed() -> None:
    plan = searched(GRPO, gpus(1, 4), "rollout=d2t2@0-3", "train=d2@2-3:offload", "ref=t2:offload")
    rollout, train, ref = (plan.calls[name] for name in ("rollout", "train", "ref"))
    assert (str(rollout.layout), rollout.ranks) == ("d2t2p1", (0, 1, 2, 3))
    assert (str(train.layout), train.ranks, train.after) == ("d2t1p1", (2, 3), "offload")
    assert (str(ref.layout), len(ref.ranks), ref.after) == ("d1t2p1", 2, "offload")
    free = searched(GRPO, gpus(1, 4))
    assert free.step_seconds is not None and plan.step_seconds is not None
    assert free.step_seconds <= plan.step_seconds + 1e-9, "what is fixed only takes choice away"
    amounts = searched(GRPO, gpus(1, 4), wishes=Wishes(1234, 5))
    assert {amounts.calls[name].micro_batch_tokens for name in ("ref", "train")} == {1234}
    assert amounts.calls["rollout"].slots == 5


@given(memory=st.integers(640, 2400), devices=st.integers(1, 3))
@settings(max_examples=6, deadline=None)
def test_a_plan_fits_or_there_is_none(memory: int, devices: int) -> None:
    """Whatever the memory: never a plan whose certificate does not fit."""
    try:
        plan = searched(GRPO, cpus(devices, memory << 20))
    except InputError as error:
        assert "fit" in str(error)
        return
    assert not overfull(plan)


def test_few_slots_where_more_do_not_fit() -> None:
    """No number of slots that is given is better than what is found; and 16 would not be found at all."""
    graph = shipped("grpo", "prompts=4", "samples=16", "max_new_tokens=3000")
    cluster = gpus(1, 2, memory=860 << 20)
    plan = searched(graph, cluster)
    assert not overfull(plan) and plan.step_seconds is not None
    given = [searched(graph, cluster, wishes=Wishes(slots=slots)).step_seconds for slots in (1, 4)]
    assert all(plan.step_seconds <= seconds * (1 + 1e-6) for seconds in given if seconds)
    with pytest.raises(InputError):
        searched(graph, cluster, "rollout=d1", wishes=Wishes(slots=16))


def test_small_micro_batches_where_larger_ones_do_not_fit() -> None:
    graph = shipped("grpo", "prompts=64", "samples=2", "max_new_tokens=64")
    graph = replace(graph, data=replace(graph.data, max_length=64))
    plan = searched(graph, cpus(1, 820 << 20))
    assert plan.calls["train"].micro_batch_tokens in (256, 512) and not overfull(plan)
    given = searched(graph, cpus(1, 820 << 20), wishes=Wishes(256)).step_seconds
    assert given and plan.step_seconds and plan.step_seconds <= given * (1 + 1e-6)
    with pytest.raises(InputError, match="train does not fit"):
        searched(graph, cpus(1, 820 << 20), wishes=Wishes(1024))


def test_asynchronous_graphs_are_planned_for_throughput() -> None:
    """Rollout and training on devices of their own, side by side: a step takes no longer than a synchronous
    one; the plan is written and read, and a run refuses it."""
    graph = replace(GRPO, max_staleness=1)
    plan, other = searched(graph, gpus(1, 4)), searched(GRPO, gpus(1, 4))
    assert plan.step_seconds is not None and other.step_seconds is not None
    assert plan.step_seconds <= other.step_seconds
    assert any(note.startswith("Asynchronous: up to 2 steps overlap") for note in plan.notes)
    assert parse_plan(plan_to_yaml(plan)) == plan
    with pytest.raises(InputError, match="cannot run yet"):
        check_runnable(plan)


def test_notes_say_what_the_numbers_rest_on() -> None:
    notes = "\n".join(searched(GRPO, cpus(2)).notes)
    for text in ("options (ways of running calls, and places) were considered", "Lengths: ", "data sheets"):
        assert text in notes
    mixed = Cluster((*gpus(1, 2, kind="cuda", memory=80 << 30).nodes,))
    assert "kind cuda is taken for h100" in "\n".join(searched(GRPO, mixed).notes)


def test_a_note_says_what_was_left_out_without_proof() -> None:
    """On large clusters with meshes of any length: then the bound is that of the options kept."""
    told = [note for note in searched(GRPO, gpus(5)).notes if "left out without proof" in note]
    assert len(told) == 1 and "gap are those of the options that were kept" in told[0]
    assert int(told[0].split()[1]) > 0
    assert not any("without proof" in note for note in searched(GRPO, gpus(1, 2)).notes)


# ---- what cannot work ------------------------------------------------------------------------------


def refusal(graph: Graph, cluster: Cluster, *fixed: str) -> str:
    with pytest.raises(InputError) as raised:
        searched(graph, cluster, *fixed)
    (problem,) = raised.value.problems
    return str(problem)


def test_a_model_that_is_too_large() -> None:
    """Call, layout, cause, bytes, and the smallest change that makes it fit: which then does."""
    told = refusal(GRPO, cpus(1, 790 << 20))
    assert "does not fit into any device, whatever its layout: even d1t1p1" in told
    assert "most of it" in told and "too few" in told
    assert "It would fit with" in told and "devices like these" in told
    count = int(told.partition(" devices like these")[0].rpartition(" ")[2])
    plan = searched(GRPO, resized(cpus(1, 790 << 20), count))
    assert plan.world_size == count and not overfull(plan)


def test_a_model_that_no_number_of_devices_holds() -> None:
    """More memory for each device is what is left; and then it does fit."""
    told = refusal(GRPO, cpus(1, 601 << 20))
    assert "devices like these" not in told and "max_new_tokens" not in told
    size = float(told.partition(" GiB of memory for each device")[0].rpartition(" ")[2])
    assert not overfull(searched(GRPO, cpus(1, int(size * 2**30))))
    assert "with 1 slot " in told and "tokens a micro-batch" not in told
    assert "take a smaller model" in refusal(GRPO, cpus(1, 64 << 20))


def test_shorter_responses_are_proposed_by_the_name_that_the_graph_has() -> None:
    """The param, where it is one; else the call's own number."""
    graph = shipped("grpo", "prompts=64", "samples=2", "max_new_tokens=64")
    graph = replace(graph, data=replace(graph.data, max_length=64))

    def told(graph: Graph) -> str:
        with pytest.raises(InputError) as raised:
            searched(graph, cpus(1, 820 << 20), wishes=Wishes(1024))
        return str(raised.value)

    assert "It would fit with max_new_tokens=16, or with " in told(graph)
    params = {"response": 64, **{key: v for key, v in graph.params.items() if key != "max_new_tokens"}}
    assert "It would fit with 16 as the max_new_tokens of rollout, or" in told(replace(graph, params=params))


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ("rollout=d16", "rollout has 8 prompts a step, too few for 16 replicas: d8 is the most"),
        ("train=d16", "give at least"),
        ("train=t16", "it has 8 attention heads; t16 needs at least 16"),
        ("train=p5", "it has 4 layers; p5 needs at least 5"),
        ("reward=d1", "reward is a function"),
        ("rolout=d1", "did you mean rollout?"),
        ("ref=d1:free", "cannot be freed: use offload"),
        ("ref=d1:recompute", "only train calls have recompute"),
        ("train=d32", "the cluster has 16 devices"),
        ("train=d2@0,3", "runs of devices"),
        ("train=t4@0-3:kep", "did you mean keep?"),
        ("train=t4@6-9", "tensor groups lie inside a node"),
    ],
)
def test_pins_that_cannot_be(fixed: str, message: str) -> None:
    told = refusal(GRPO, gpus(2, 8), fixed)
    assert message in told and f"--fix {fixed}" in told


def test_pins_that_exclude_each_other() -> None:
    """Each fits by itself on the device; together they do not, and the message names both."""
    cluster, graph = cpus(2, 850 << 20), shipped("ppo", "prompts=8")
    fixed = ("train=d1@0:keep", "train_critic=d1@0:keep")
    for alone in fixed:
        assert not overfull(searched(graph, cluster, alone))
    told = refusal(graph, cluster, *fixed)
    assert "train and train_critic do not fit together: the fullest device lacks" in told
    assert all(f"--fix {one}" in told for one in fixed)
    assert "nothing fixed (without --fix)" in told


# ---- without torch ---------------------------------------------------------------------------------

BLOCKED = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
from realflow.cli import main
assert main(sys.argv[1:]) == 0
assert sys.modules["torch"] is None
"""


def test_torch_need_not_be_there_and_a_config_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "tiny")
    monkeypatch.setenv("REALFLOW_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "plan.yaml"
    argv = [
        "plan",
        "grpo",
        f"model={folder}",
        "prompts=8",
        "--devices",
        "2",
        "--effort",
        "low",
        "-o",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *argv], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = parse_plan(out.read_text())
    assert plan.step_seconds and plan.cards == {} and plan.memory
    assert any("the config alone is known" in note for note in plan.notes)
    assert not (tmp_path / "cache").exists(), "no card was made"
