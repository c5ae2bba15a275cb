"""Planning from given layouts: ranks, slots, reallocations, memory and notes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner import local_cluster, make_plan, parse_layouts, read_cluster
from realflow.errors import InputError
from realflow.graph import find_graph, load_graph
from realflow.layout import Layout
from realflow.models.card import Card
from realflow.planfile import Cluster, Node, Plan, parse_plan, plan_to_yaml

GRPO = load_graph(find_graph("grpo"))


def plan_of(card: Card, devices: int, *layouts: str, **options: object) -> Plan:
    cluster = Cluster((Node("local", devices, "cpu", 8 << 30),))
    cards = dict.fromkeys(GRPO.models, card)
    return make_plan(GRPO, cluster, parse_layouts(layouts), cards, **options)  # type: ignore[arg-type]


def test_every_call_runs_on_all_devices_unless_told(small_card: Card) -> None:
    plan = plan_of(small_card, 3)
    assert {call.ranks for call in plan.calls.values()} == {(0, 1, 2)}
    assert {str(call.layout) for call in plan.calls.values()} == {"d3t1p1"}
    engines = {name: call.engine for name, call in plan.calls.items()}
    assert engines == {
        "rollout": "native",
        "reward": "python",
        "ref": "infer",
        "credit": "python",
        "train": "train",
    }
    assert plan.reallocs == ()
    assert plan.cards == {"actor": small_card.hash, "ref": small_card.hash}


def test_calls_on_ranks_of_their_own(small_card: Card) -> None:
    plan = plan_of(small_card, 5, "d1", "rollout=d3@0,1,4", "train=d2@1-2", "ref=d1@2")
    assert plan.calls["rollout"].ranks == (0, 1, 4)
    assert plan.calls["reward"].ranks == (0,)
    (realloc,) = plan.reallocs
    weights = 2 * (100 * 16 + 16 * 16 + 16)  # bfloat16, the tied head once
    assert (realloc.model, realloc.source, realloc.destination) == ("actor", "train", "rollout")
    assert realloc.bytes == realloc.lower_bound_bytes == 2 * weights, "rank 1 trains and has them"
    assert any("rank 3" in note for note in plan.notes)
    assert set(plan.memory) == {0, 1, 2, 4}
    assert plan.memory[4]["weights"] == weights
    assert plan.memory[2]["weights"] == 2 * weights, "actor and ref"
    assert "optimizer" not in plan.memory[0]


def test_slots_are_the_share_of_the_step(small_card: Card) -> None:
    # 8 prompts x 8 samples: the samples of a prompt stay together, and 64 is the most.
    assert [plan_of(small_card, n).calls["rollout"].slots for n in (1, 2, 3, 8)] == [64, 32, 24, 8]
    assert plan_of(small_card, 2, slots=5).calls["rollout"].slots == 5
    assert plan_of(small_card, 2, micro_batch_tokens=99).calls["train"].micro_batch_tokens == 99


def test_amounts_that_no_run_can_mean_are_refused(small_card: Card) -> None:
    assert plan_of(small_card, 1, slots=64).calls["rollout"].slots == 64
    for wrong in ({"slots": 65}, {"slots": 0}, {"micro_batch_tokens": 15}):
        with pytest.raises(InputError, match="expected at"):
            plan_of(small_card, 1, **wrong)


def test_lengths_are_held_against_the_positions_of_the_model(small_card: Card) -> None:
    # 64 positions: 16 new tokens leave 48 for the prompt, of which the default limit allows more.
    notes = [note for note in plan_of(small_card, 1).notes if note.startswith("Length: rollout")]
    assert len(notes) == 1 and "have room for 48" in notes[0]
    for new, fits in ((63, True), (64, False)):
        graph = load_graph(find_graph("grpo"), [f"max_new_tokens={new}"])
        try:
            make_plan(graph, local_cluster(1), {}, dict.fromkeys(graph.models, small_card))
            assert fits
        except InputError as error:
            assert not fits and "graph.calls.rollout.max_new_tokens" in str(error)


def test_too_little_memory_is_a_note(small_card: Card) -> None:
    cards = dict.fromkeys(GRPO.models, small_card)
    plan = make_plan(GRPO, Cluster((Node("local", 1, "cpu", 1 << 20),)), {}, cards)
    assert any(note.startswith("Memory: rank 0 is expected to need") for note in plan.notes)


# The card is a frozen value: sharing it between examples is safe.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layouts_that_fit_give_a_sound_plan(small_card: Card, data: st.DataObject) -> None:
    devices = data.draw(st.integers(1, 9))
    layouts = []
    for call in GRPO.calls:
        ranks = data.draw(st.lists(st.integers(0, devices - 1), unique=True, max_size=devices))
        if ranks:
            layouts.append(f"{call.name}=d{len(ranks)}@{','.join(map(str, sorted(ranks)))}")
    plan = plan_of(small_card, devices, *layouts)
    assert parse_plan(plan_to_yaml(plan)) == plan
    trained = set(plan.calls["train"].ranks)
    missing = set(plan.calls["rollout"].ranks) - trained
    assert sum(r.bytes for r in plan.reallocs) == len(missing) * small_card.weight_bytes("bfloat16")


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        (
            ["d4"],
            "--layout d4: does not fit: d4t1p1 needs 4 ranks, but the cluster has 3 devices (ranks 0 to",
        ),
        (["d2@0"], "d2t1p1 needs 2 ranks, but 1 are given"),
        (["rollout=d4"], "--layout rollout=d4: does not fit: "),
        (["d1@3"], "--layout d1@3: does not fit: rank 3 is given, but the cluster has 3 devices"),
        (["reward=d4"], "(ranks 0 to 2). Of 3 ranks these work: d3t1p1"),
        (["d2@x"], "'x' are no ranks"),
        (["d2@"], "'' are no ranks"),
        (["rolout=d1"], "the graph has no call rolout; did you mean rollout?"),
        (["rollout=d1", "rollout=d2"], "the layout of rollout is given twice"),
        (["d1", "d2"], "a layout for all calls is given twice"),
        (["d3@0,2,1"], "found 0,2,1; expected rising ranks: 0-2"),
        (
            ["rollout=t2"],
            "--layout rollout=t2: d1t2p1 cannot cut actor: LlamaForCausalLM: model.layers.0.self_attn",
        ),
        (["rollout=p3"], "has 2 layers; p3 needs at least 3: use p1 to p2. Of 3 ranks these work: d3t1p1"),
        (["d2:"], "'' is none of 1f1b, zero_bubble, recompute"),
        (
            ["d2:recomptue"],
            "'recomptue' is none of 1f1b, zero_bubble, recompute, sequence_parallel, keep, offload",
        ),
        (["d2:recomptue"], "did you mean recompute?"),
        (["d2:recompute,recompute"], "recompute is given twice"),
        (["d2:keep,offload"], "keep and offload exclude each other"),
        (["p2:zero_bubble,1f1b"], "zero_bubble and 1f1b exclude each other"),
        (["train=d2:zero_bubble"], "zero_bubble fills the gaps of a pipeline, and d2t1p1 has none"),
        (["train=d2:sequence_parallel"], "divides tokens over a tensor group, and d2t1p1 has none: leave"),
        (["ref=d2:recompute"], "only train calls have recompute, and ref is infer: remove it"),
        (["rollout=d1:1f1b"], "only train calls have 1f1b, and rollout is generate: remove it"),
        (["reward=d2:offload"], "reward is a function and holds no weights: remove offload"),
        (["reward=d2:keep"], "reward is a function and holds no weights: remove keep"),
        (["ref=d1:free"], "ref is not trained, so that no reallocation brings its weights again"),
        (["d2:free"], "--layout d2:free: no call can free its weights: rollout uses the very weights"),
        (["reward=t2"], "reward is a function: use d2"),
        (["d2@0,0"], "rank 0 is given twice"),
        (["2"], "expected letters with sizes"),
        (["c2"], "reserved and cannot run yet"),
    ],
)
def test_layouts_that_are_refused(small_card: Card, layouts: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_of(small_card, 3, *layouts)
    assert message in str(caught.value)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, "told once, whichever calls it is for"
    assert lines[0].startswith(("--layout", "layout"))


def test_a_function_that_sees_the_whole_batch_runs_on_one_rank(small_card: Card, tmp_path: Path) -> None:
    (tmp_path / "whole_batch_mod.py").write_text(
        "from realflow.graph import function\n"
        "@function(reads={'rewards': 'sample float'}, writes={'advantages': 'sample float'}, scope='batch')\n"
        "def centre(rewards):\n    return rewards - rewards.mean()\n"
    )
    text = find_graph("grpo").read_text().replace("advantages.grpo", "whole_batch_mod:centre")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    graph = load_graph(path)
    cards = dict.fromkeys(graph.models, small_card)
    cluster = Cluster((Node("local", 2),))
    plan = make_plan(graph, cluster, {"*": "d2"}, cards)
    assert (plan.calls["credit"].layout, plan.calls["credit"].ranks) == (Layout(), (0,))
    with pytest.raises(InputError, match="must see the whole batch at once"):
        make_plan(graph, cluster, {"credit": "d2"}, cards)


def test_local_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.cluster._gpus", lambda: 0)
    assert local_cluster().devices == tuple(f"local:{i}" for i in range(min(2, os.cpu_count() or 1)))
    (node,) = local_cluster(3).nodes
    assert (node.name, node.devices, node.kind) == ("local", 3, "cpu")
    assert node.memory_bytes is not None and node.memory_bytes > 0
    with pytest.raises(InputError, match="found 0; expected from 1"):
        local_cluster(0)
    monkeypatch.setattr("planner.cluster._gpus", lambda: 4)
    assert local_cluster().nodes == (Node("local", 4, "cuda"),)
    with pytest.raises(InputError, match="this machine has 4 GPUs"):
        local_cluster(5)


def test_units_of_cluster_files(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    for memory, speed, size, rate in (
        ("80 GB", "400 Gb/s", 80 * 10**9, 50e9),
        ("80GiB", "50 GB/s", 80 << 30, 50e9),
        ("1.5 TiB", "1 GiB/s", 3 << 39, float(1 << 30)),
        ("512 MB", "800 Mb/s", 512 * 10**6, 1e8),
        ("4096", "1250000000", 4096, 1.25e9),
    ):
        path.write_text(f"nodes:\n  - {{name: a, devices: 1, memory: {memory}, between: {speed}}}\n")
        (node,) = read_cluster(path).nodes
        assert (node.memory_bytes, node.between) == (size, rate), (memory, speed)


def test_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "nodes:\n  - {name: n1, devices: 8, kind: cuda, memory: 80 GiB, inside: 450 GB/s, between: 25 GB/s}\n"
        "  - {name: n2, devices: 2, memory: 1024}\n"
    )
    first = Node("n1", 8, "cuda", 80 << 30, 450e9, 25e9)
    assert read_cluster(path).nodes == (first, Node("n2", 2, "cpu", 1024))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("nodes: []\n", 1, "it is empty: give at least one, such as {name: node01, devices: 8"),
        ("node:\n  - {name: a, devices: 1}\n", 1, "unknown key 'node'; did you mean 'nodes'?"),
        ("nodes:\n  - {name: a}\n", 2, "'devices' is missing"),
        ("nodes:\n  - {name: a, devices: 0}\n", 2, "expected a whole number from 1"),
        ("nodes:\n  - {name: a, devices: 1, memory: much}\n", 2, "expected bytes, such as 80 GiB"),
        ("nodes:\n  - {name: a, devices: 1, kind: tpu}\n", 2, "expected one of cpu, cuda"),
        ("nodes:\n  - {name: a, devices: 1, inside: fast}\n", 2, "expected bytes a second, such as 50 GB/s"),
        ("nodes:\n  - {name: a, devices: 1, inside: 4 gb/s}\n", 2, "did you mean GB/s or Gb/s?"),
        ("nodes:\n  - {name: a, devices: 1, memory: 4 GHz}\n", 2, "GHz is no unit of it"),
        ("nodes:\n  - {name: a, devices: 1}\n  - {name: a, devices: 1}\n", 3, "a node a is given twice"),
        ("nodes:\n  - a\n", 2, "expected a mapping"),
        ("- 1\n", 1, "expected a cluster file"),
    ],
)
def test_broken_cluster_files(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_cluster(path)
    problem = next(problem for problem in caught.value.problems if message in str(problem))
    assert (problem.file, problem.line) == (str(path), line)
