"""Plans with tensor and pipeline parallel calls: what they may say, what moves, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
from golden_plans import PLANS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cards import STYLES, llama_card

from planner import make_plan, parse_layouts
from planner.layouts import read_choice
from realflow.errors import InputError
from realflow.graph import find_graph, load_graph
from realflow.layout import Box, DeviceMesh, Layout
from realflow.models.card import Card
from realflow.models.layouts import accepted, nearest, plan_problems, refusals
from realflow.models.partition import partition
from realflow.planfile import CallPlan, Cluster, Node, Plan, check_plan, parse_plan, plan_to_yaml, read_plan
from realflow.planfile.flags import FLAGS, flag_words
from realflow.planfile.holdings import held_by

GRPO, PPO = (load_graph(find_graph(name)) for name in ("grpo", "ppo"))
CARD = llama_card()
GOLDEN = Path(__file__).parent / "golden"


def plan_of(devices: int, *layouts: str, card: Card = CARD, nodes: int = 1) -> Plan:
    cluster = Cluster(tuple(Node(f"n{i}", devices // nodes, "cuda") for i in range(nodes)))
    return make_plan(GRPO, cluster, parse_layouts(layouts), dict.fromkeys(GRPO.models, card))


@pytest.mark.parametrize("name", PLANS)
def test_golden_plans(name: str) -> None:
    """`python tests/plan/golden_plans.py` writes them anew; look at the difference before you keep it."""
    text = (GOLDEN / f"{name}.yaml").read_text("utf-8")
    assert plan_to_yaml(PLANS[name]()) == text
    assert plan_to_yaml(parse_plan(text)) == text


# ---- layouts as texts -------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.sampled_from(["1f1b", "zero_bubble", None]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["keep", "offload", "free", None]),
    st.randoms(),
)
def test_flags_are_read_in_any_order(
    schedule: str | None, recompute: bool, sequence: bool, after: str | None, random: st.randoms
) -> None:
    words = [word for word in (schedule, after) if word]
    words += ["recompute"] * recompute + ["sequence_parallel"] * sequence
    random.shuffle(words)
    chosen = read_choice("d1t2p2@0-3" + (":" + ",".join(words) if words else ""), 4)
    assert (chosen.layout, chosen.ranks) == (Layout(1, 2, 2), (0, 1, 2, 3))
    call = CallPlan(chosen.ranks, chosen.layout, "train", **chosen.flags)
    assert call.schedule == (schedule or "1f1b") and call.after == (after or "keep")
    assert (call.recompute, call.sequence_parallel) == (recompute, sequence)
    assert set(flag_words(call)) == set(words) - {"1f1b", "keep"}


@settings(deadline=None)
@given(st.text(max_size=12), st.text("dtp@:,=-0123456789rec", max_size=14))
def test_any_text_is_read_or_refused(free: str, near: str) -> None:
    for text in (free, near, f"d2:{free}", f"t2@{near}"):
        try:
            chosen = read_choice(text, 4)
        except InputError as error:
            assert len(str(error)) < 400
        else:
            assert len(chosen.ranks) == chosen.layout.size


def test_flags_for_all_calls_go_where_they_mean_something() -> None:
    calls = plan_of(4, "d2t2:sequence_parallel,recompute,offload").calls
    assert calls["train"].sequence_parallel and calls["train"].recompute
    assert not calls["rollout"].recompute and calls["reward"].layout == Layout(dp=4)
    assert {name: call.after for name, call in calls.items()} == {
        "rollout": "offload",
        "reward": "keep",
        "ref": "offload",
        "credit": "keep",
        "train": "offload",
    }
    assert set(FLAGS) == {"1f1b", "zero_bubble", "recompute", "sequence_parallel", "keep", "offload", "free"}


# ---- what moves -------------------------------------------------------------------------------


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(start, stop) for start, stop in box)))


def lacking(card: Card, source: DeviceMesh, destination: DeviceMesh) -> int:
    """Elements that the destination's ranks lack, counted one by one."""
    there, here = (partition(card, mesh.layout).holders(mesh) for mesh in (source, destination))
    total = 0
    for name, holders in here.items():
        for rank, box in holders:
            own = [elements(other) for held, other in there[name] if held == rank]
            total += len(elements(box).difference(*own))
    return total


TINY = llama_card(layers=2, hidden=6, heads=3, kv_heads=1, intermediate=5, vocab=7)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_moves_are_counted_element_by_element(data: st.DataObject) -> None:
    """Rollout and training under any layouts, on any ranks: the plan's bytes are what is lacking."""
    world = data.draw(st.integers(1, 6))

    def mesh() -> DeviceMesh:
        ranks = data.draw(
            st.lists(st.integers(0, world - 1), min_size=1, max_size=4, unique=True).map(sorted)
        )
        return DeviceMesh(tuple(ranks), data.draw(st.sampled_from(accepted(TINY, len(ranks)))))

    source, destination = mesh(), mesh()
    given = [f"{name}={m.layout}@{','.join(map(str, m.ranks))}" for name, m in
             (("train", source), ("rollout", destination))]  # fmt: skip
    plan = plan_of(world, f"d{world}", *given, card=TINY)
    assert parse_plan(plan_to_yaml(plan)) == plan
    count = lacking(TINY, source, destination)
    train, rollout = (held_by(plan.calls[name]) for name in ("train", "rollout"))
    found = [realloc.bytes for realloc in plan.reallocs]
    assert found == ([] if rollout <= train else [2 * count])
    assert [realloc.lower_bound_bytes for realloc in plan.reallocs] == found


def test_a_relay_is_not_counted_twice_as_lacking() -> None:
    """Two nodes: what both ranks of the second lack crosses once, and is relayed there."""
    plan = plan_of(4, "d1@0", "train=d2@0-1", "rollout=d2@2-3", nodes=2)
    (realloc,) = plan.reallocs
    assert realloc.bytes == realloc.lower_bound_bytes == 2 * CARD.weight_bytes("bfloat16")


def test_only_trained_models_move() -> None:
    assert plan_of(4, "d4", "ref=t2p2").reallocs == ()
    assert plan_of(4, "t2p2", "rollout=p2@0-1:free").reallocs[0].destination == "rollout"


def test_a_model_that_follows_another_gets_its_weights_in_its_own_layout(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = (
        find_graph("grpo")
        .read_text()
        .replace("  ref:    #", "  ref:\n    follows: {model: actor, decay: 0.9}\n    #")
    )
    path.write_text(text)
    graph, cluster = load_graph(path), Cluster((Node("local", 4, "cuda"),))
    cards = dict.fromkeys(graph.models, TINY)
    plan = make_plan(graph, cluster, parse_layouts(["t3@0-2", "ref=d1@3"]), cards)
    (move,) = plan.reallocs
    assert (move.model, move.source, move.destination, move.follower) == ("actor", "train", "", "ref")
    assert move.bytes == move.lower_bound_bytes == TINY.weight_bytes("bfloat16")
    assert plan.memory[3]["buckets"] == move.bytes
    assert parse_plan(plan_to_yaml(plan)) == plan
    with pytest.raises(
        InputError, match="actor from train to ref, which follows it, is missing: the graph says that ref"
    ):
        check_plan(dataclasses.replace(plan, reallocs=()))


def test_a_follower_in_two_layouts_on_one_rank_is_one_move(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    call = "  again:\n    model: ref\n    op: infer\n    use: logprobs\n    writes: {logprobs: again}\n"
    text = find_graph("grpo").read_text()
    text = text.replace("  ref:    #", "  ref:\n    follows: {model: actor, decay: 0.9}\n    #")
    path.write_text(text.replace("calls:\n", "calls:\n" + call))
    graph, cluster = load_graph(path), Cluster((Node("local", 4, "cuda"),))
    cards = dict.fromkeys(graph.models, TINY)
    plan = make_plan(graph, cluster, parse_layouts(["d1@0", "ref=d1@3", "again=p2@2-3"]), cards)
    (move,) = plan.reallocs
    assert (move.model, move.destination, move.follower) == ("actor", "", "ref")
    assert move.bytes == move.lower_bound_bytes > 2 * TINY.weight_bytes("bfloat16") - 1
    assert parse_plan(plan_to_yaml(plan)) == plan


def test_six_calls_in_six_layouts() -> None:
    """graphs/ppo.yaml: each call of a model with a layout and ranks of its own."""
    layouts = ["d1@0", "rollout=d2@0-1", "reward=t2@2-3", "ref=p2@1-2:offload", "values=d1t1p1@3:free",
               "train=d2t2@0-3", "train_critic=t2p2@0-3:zero_bubble,sequence_parallel"]  # fmt: skip
    cluster = Cluster((Node("local", 4, "cpu", 8 << 30),))
    plan = make_plan(PPO, cluster, parse_layouts(layouts), dict.fromkeys(PPO.models, CARD))
    model_calls = [call.name for call in PPO.calls if call.model]
    assert len({(plan.calls[name].layout, plan.calls[name].ranks) for name in model_calls}) == 6
    assert {(r.model, r.source, r.destination) for r in plan.reallocs} == {
        ("actor", "train", "rollout"),
        ("critic", "train_critic", "values"),
    }
    assert parse_plan(plan_to_yaml(plan)) == plan


# ---- what a model cannot do -------------------------------------------------------------------


def fused(card: Card) -> Card:
    styles = {name: style for name, style in STYLES.items() if "q_proj" not in name}
    return dataclasses.replace(
        card, tensor_styles={**styles, "model.layers.*.self_attn.q_proj": "packed_colwise"}
    )


IMPOSSIBLE: dict[str, tuple[Card, str, str]] = {
    "unknown style": (fused(CARD), "t2", "has the style 'packed_colwise'"),
    "no tensor plan": (llama_card(tensor_styles={}), "d2t2", "publishes no tensor plan (tp_plan)"),
    "no pipeline plan": (llama_card(pipeline_styles={}), "p2", "publishes no pipeline plan (pp_plan)"),
    "too few heads": (CARD, "t6", "it has 4 attention heads; t6 needs at least 6: use t1 to t4"),
    "too few layers": (CARD, "d1p5", "has 4 layers; p5 needs at least 5: use p1 to p4"),
}


def words(layouts: Iterable[Layout]) -> str:
    return ", ".join(map(str, layouts))


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_a_model_cannot_do_is_refused_with_what_works(case: str) -> None:
    card, text, reason = IMPOSSIBLE[case]
    layout = Layout.parse(text)
    with pytest.raises(InputError) as caught:
        plan_of(layout.size, "d1", f"ref={text}", card=card)
    (problem,) = caught.value.problems
    assert problem.where == f"--layout ref={text}"
    assert problem.message.startswith(f"{layout} cannot cut ref: LlamaForCausalLM")
    assert reason in problem.message
    works = problem.message.partition("these work: ")[2].split(", ")
    assert works and all(not refusals(card, Layout.parse(other)) for other in works)
    assert all(Layout.parse(other).size == layout.size for other in works)
    assert plan_of(layout.size, "d1", f"ref={works[0]}", card=card)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40))
def test_every_layout_that_works_is_found(ranks: int) -> None:
    found = accepted(CARD, ranks)
    every = [Layout(d, t, p) for d in range(1, ranks + 1) for t in range(1, ranks + 1)
             for p in range(1, ranks + 1) if d * t * p == ranks]  # fmt: skip
    assert sorted(found) == sorted(layout for layout in every if layout.tp <= 4 and layout.pp <= 4)
    wanted = Layout(tp=ranks)
    assert nearest(found, wanted) == nearest(reversed(found), wanted)
    assert (wanted in found) == (nearest(found, wanted)[:1] == [wanted])


def test_a_plan_by_hand_is_checked_against_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file keeps every rule; only the model knows better. Models that are not cut need no card."""
    monkeypatch.setattr("realflow.models.layouts.resolve_model", lambda path: path)
    asked: list[str] = []
    monkeypatch.setattr("realflow.models.layouts.card", lambda path, say: (asked.append(path), CARD)[1])
    path = tmp_path / "plan.yaml"
    path.write_text(plan_to_yaml(plan_of(6, "d6")))
    assert read_plan(path, plan_problems) and asked == []
    path.write_text(
        path.read_text().replace("layout: d6t1p1\n    engine: infer", "layout: t6\n    engine: infer")
    )
    assert read_plan(path).calls["ref"].layout == Layout(tp=6)
    with pytest.raises(InputError) as caught:
        read_plan(path, plan_problems)
    (problem,) = caught.value.problems
    assert (problem.file, problem.where) == (str(path), "calls.ref.layout")
    assert problem.line and path.read_text().splitlines()[problem.line - 1].strip() == "layout: t6"


# ---- after a call -----------------------------------------------------------------------------


def test_offload_and_free_that_another_call_undoes_are_noted() -> None:
    def noted(*layouts: str) -> list[str]:
        return [note for note in plan_of(4, *layouts).notes if note.startswith("After: ")]

    assert noted("d4", "rollout=d4:offload") == [
        "After: rollout says offload, but on ranks 0-3 train uses the same weights and keeps them."
    ]
    assert noted("d4", "rollout=d4:free", "train=d2@0-1") == [
        "After: rollout says free, but on ranks 0-1 train uses the same weights and keeps them."
    ]
    assert noted("d4:offload") == noted("d4", "ref=d4:offload") == noted("d4", "rollout=t2p2:free") == []
    assert noted("d4", "train=d4:offload") == [], "gradients and optimizer states do leave"


def test_freeing_is_refused_where_nothing_brings_the_weights() -> None:
    for layouts, reason in (
        (("d4", "ref=t2p2:free"), "ref is not trained"),
        (("d4", "train=t2p2:free"), "train has the newest weights of actor"),
        (("t2p2", "rollout=t2p2:free"), "rollout uses the very weights that train trains"),
        (("d4", "rollout=d2@1-2:free"), "rollout uses the very weights that train trains"),
    ):
        with pytest.raises(InputError, match=reason):
            plan_of(4, *layouts)


def test_free_for_all_calls_holds_for_those_that_can() -> None:
    plan = plan_of(4, "t2p2:free", "train=d4")
    assert {name: call.after for name, call in plan.calls.items() if name in ("rollout", "ref", "train")} == {
        "rollout": "free",
        "ref": "keep",
        "train": "keep",
    }
    assert "After: free holds for rollout; ref keeps its weights." in plan.notes
    assert parse_plan(plan_to_yaml(plan)) == plan
    with pytest.raises(InputError) as caught:
        plan_of(4, "t2p2:free")
    (problem,) = caught.value.problems
    assert problem.where == "--layout t2p2:free"
    assert "rollout uses the very weights that train trains" in problem.message
    assert "ref is not trained" in problem.message


def test_problems_are_told_once_for_each_layout_given() -> None:
    """Two models in three calls of one layout, and a fourth call with one of its own."""
    card = llama_card(hidden=72, heads=9, kv_heads=3)
    with pytest.raises(InputError) as caught:
        plan_of(12, "t12", "train=t10@0-9", card=card)
    first, second = caught.value.problems
    assert first.where == "--layout t12" and "cannot cut actor and ref: " in first.message
    assert second.where == "--layout train=t10@0-9" and "cannot cut actor: " in second.message
    assert "Of 12 ranks these work: d1t6p2, d2t6p1, " in first.message


def test_too_few_devices_do_not_hide_what_a_model_cannot_do() -> None:
    card = llama_card(hidden=72, heads=9, kv_heads=3)
    with pytest.raises(InputError) as caught:
        plan_of(2, "t12", card=card)
    (problem,) = caught.value.problems
    assert problem.message.startswith("does not fit: d1t12p1 needs 12 ranks, but the cluster has 2 devices")
    assert "it has 9 attention heads; t12 needs at least 12" in problem.message
    works = problem.message.partition("Of 2 ranks these work: ")[2].split(", ")
    assert sorted(works) == ["d1t1p2", "d1t2p1", "d2t1p1"]
    assert all(plan_of(2, text, card=card) for text in works)


# ---- scale ------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_large_cluster_is_planned_in_seconds() -> None:
    """70B shapes on 512 devices of 64 nodes: card, schedule and memory."""
    card = llama_card(80, 8192, 64, 8, 28672, 128256, tied=False)
    cluster = Cluster(tuple(Node(f"n{i}", 8, "cuda", 80 << 30) for i in range(64)))
    layouts = parse_layouts(["d64t8", "train=d8t8p8:recompute,offload", "ref=d64t8:offload"])
    plan = make_plan(GRPO, cluster, layouts, dict.fromkeys(GRPO.models, card))
    (realloc,) = plan.reallocs
    assert realloc.bytes == realloc.lower_bound_bytes > 0
    assert len({tuple(row.items()) for row in plan.memory.values()}) < 60
    text = plan_to_yaml(plan)
    assert len(text) < 40_000 and parse_plan(text) == plan
