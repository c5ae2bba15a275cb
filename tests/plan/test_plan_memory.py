"""Memory by cause: what each part of a model needs, and which moment of a step is the worst."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_parts import CARD, GIB, GRPO, part_of, plan_of
from small_cards import llama_card

from planner import Assumptions, make_plan, overfull, parse_layouts
from planner.callbytes import kv_bytes, training_bytes
from planner.lengths import read_lengths
from planner.loads import Load, worst_load
from planner.memory import Step
from planner.passing import MESSAGES, in_flight, passing_bytes
from planner.sizes import Parts
from realflow.graph import find_graph, load_graph
from realflow.graph.types import Call, Follow
from realflow.layout import Layout, box_size
from realflow.models.card import Card
from realflow.models.layouts import accepted
from realflow.models.partition import partition
from realflow.planfile import CallPlan, Cluster, Node
from realflow.planfile.holdings import Holding, holdings


def slots_of(call: Call, slots: int, prompt: int) -> Load:
    """The load of a generate call."""
    graph = dataclasses.replace(GRPO, data=dataclasses.replace(GRPO.data, max_length=prompt))
    assert call.sampling is not None
    longest = prompt, call.sampling.max_new_tokens
    return worst_load(graph, call, CallPlan((0,), Layout(), "native", slots=slots), longest, 2048)


cards = st.builds(
    lambda layers, groups, kv, width, vocab, tied: llama_card(
        layers, 4 * groups * kv, groups * kv, kv, width, vocab, tied=tied
    ),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(8, 50),
    st.integers(8, 99),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(cards, st.integers(1, 12), st.data())
def test_the_ranks_together_hold_the_model(card: Card, ranks: int, data: st.DataObject) -> None:
    """Every element once in each replica, but for what the partition says is held whole or twice."""
    layout = data.draw(st.sampled_from(accepted(card, ranks)))
    cut = partition(card, layout)
    where = CallPlan(tuple(range(ranks)), layout, "train")
    parts = Parts(GRPO, {"actor": card})
    held = sum(parts.of("actor", holding).elements for holding in holdings(where).values())
    copies = Counter({p.name: 1 for p in card.parameters})
    for name in copies:
        copies[name] *= layout.tp if cut.is_whole(name) else 1
        copies[name] *= 2 if name in cut.tied else 1
    assert held == layout.dp * sum(copies[p.name] * p.size for p in card.parameters)
    assert layout.size > layout.dp or held == layout.dp * card.size


def test_formulas_of_a_whole_model() -> None:
    whole, rollout = part_of(CARD), GRPO.call("rollout")
    assert whole.weight_bytes == 2 * CARD.size
    size, padded = CARD.size, -(-CARD.size // 128) * 128
    assert training_bytes(whole, 1) == {"masters": 4 * size, "optimizer": 8 * size, "gradients": 4 * size}
    shared = {"masters": padded, "optimizer": 2 * padded, "gradients": 4 * padded}
    assert training_bytes(whole, 4) == shared, "padded so that 4 ranks have whole parts"
    assert training_bytes(part_of(CARD, dtype="float64"), 1) == {
        "optimizer": 16 * size,
        "gradients": 8 * size,
    }
    # keys and values x layers x kv heads x head_dim x 2 bytes x slots x tokens
    assert kv_bytes(whole, slots_of(rollout, 3, 1024)) == 2 * 4 * 2 * 8 * 2 * 3 * (1024 + 16)
    assert kv_bytes(whole, slots_of(rollout, 3, 5000)) == 2 * 4 * 2 * 8 * 2 * 3 * 2048, "its positions"


def test_formulas_of_a_part() -> None:
    """A layout d1t2p2 of 4 layers, 4 heads, 2 KV heads: halves of everything but norms and ends."""
    rollout = GRPO.call("rollout")
    first, last = part_of(CARD, "t2p2", 0), part_of(CARD, "t2p2", 3)
    assert [(part.layers, part.query_heads, part.kv_heads) for part in (first, last)] == [(2, 2, 1)] * 2
    assert kv_bytes(first, slots_of(rollout, 3, 1024)) == 2 * 2 * 1 * 8 * 2 * 3 * (1024 + 16)
    layer = (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) // 2 + 2 * 32
    assert first.elements == 2 * layer + 50 * 32
    assert last.elements == 2 * layer + 50 * 32 + 32, "the tied table and the last norm"
    assert (first.logits, last.logits) == (0, 50)
    shared = part_of(llama_card(heads=8, kv_heads=2), "t4")
    assert shared.kv_heads == 2, "key and value heads that do not divide are held by every rank"


def test_uneven_heads_are_counted_where_they_are() -> None:
    card = llama_card(hidden=72, heads=9, kv_heads=3)
    assert [part_of(card, "t2", rank).query_heads for rank in (0, 1)] == [4, 5]
    assert part_of(card, "t2", 0).elements < part_of(card, "t2", 1).elements


def test_micro_batches_in_flight_are_those_of_the_schedules() -> None:
    from realflow.engines.pipeline import alive

    for schedule in ("1f1b", "zero_bubble"):
        for stages in range(1, 6):
            layout = Layout(pp=stages)
            where = CallPlan(tuple(range(stages)), layout, "train", schedule=schedule)  # type: ignore[arg-type]
            for stage in range(stages):
                for count in range(1, 9):
                    assert in_flight(where, stage, count) == alive(schedule, stages, stage, count)


def test_messages_under_way_are_those_of_the_links() -> None:
    from realflow.engines.links import AHEAD, UNSENT

    assert MESSAGES == AHEAD + UNSENT
    states = 4096 * 32 * 2
    found = [passing("p4", rank)["messages"] for rank in range(4)]
    assert found == [4 * states, 8 * states, 8 * states, 4 * states]
    assert "messages" not in passing("d4")
    assert passing("t2p2", sequence_parallel=True)["messages"] == 2 * states
    assert "messages" in plan_of(CARD, 2, "d2", "train=p2").memory[0]


def test_offloaded_gradients_need_no_memory() -> None:
    """Nothing of them is kept: on a host that holds optimizer states, only these are counted."""
    small = dataclasses.replace(SHORT, prompts=1)
    layouts = ("d1@0", "ref=d1@1", "train=d1@1:offload")
    memory = plan_of(WIDE, 2, *layouts, kind="cpu", graph=small).memory[1]
    assert {"optimizer", "gradients"} <= memory.keys(), "the worst moment is training"
    step = Step(
        small, plan_of(WIDE, 2, *layouts, graph=small).calls, Parts(small, dict.fromkeys(small.models, WIDE))
    )
    (moment,) = [m for m in step.moments(1) if m.name == "ref"]
    assert step.at(moment, 1, "cpu")["offloaded"] == (12 + 2) * WIDE.size, "and weights"


def passing(layout: str, rank: int = 0, card: Card = CARD, **flags: object) -> dict[str, int]:
    """What passes through a rank that trains on full micro-batches of the longest samples."""
    sizes = Layout.parse(layout)
    where = CallPlan(tuple(range(sizes.size)), sizes, "train", **flags)  # type: ignore[arg-type]
    call, part, lengths = GRPO.call("train"), part_of(card, layout, rank), read_lengths(GRPO)
    load = worst_load(GRPO, call, where, (lengths.longest_prompt, lengths.longest_response), part.positions)
    return passing_bytes(call, where, part, load)


def test_a_follower_in_bfloat16_has_an_average_behind_its_weights() -> None:
    """Four bytes more for each weight, in host memory meanwhile where the follower is offloaded."""
    found = {}
    for dtype, decay in (("bfloat16", 0.0), ("bfloat16", 0.9), ("float32", 0.0), ("float32", 0.9)):
        ref = dataclasses.replace(GRPO.models["ref"], dtype=dtype, follows=Follow("actor", decay))
        graph = dataclasses.replace(GRPO, models={**GRPO.models, "ref": ref})
        for after in ("keep", "offload"):
            plan = plan_of(CARD, 2, "d1@0", f"ref=d1@1:{after}", kind="cpu", graph=graph)
            memory = plan.memory[1]
            found[dtype, decay, after] = memory["weights"] + memory.get("offloaded", 0)
    for after in ("keep", "offload"):
        more = found["bfloat16", 0.9, after] - found["bfloat16", 0.0, after]
        assert more == 4 * CARD.size
        assert found["float32", 0.9, after] == found["float32", 0.0, after]


# A model whose activations are large against its logits.
DEEP = llama_card(layers=8, hidden=64, heads=4, kv_heads=2, intermediate=256, vocab=100)


def test_activations_follow_the_schedule() -> None:
    one, first, last = (passing(*where, card=DEEP) for where in (("d1",), ("p2", 0), ("p2", 1)))
    assert first["activations"] == pytest.approx(one["activations"], rel=0.1), "half the layers, twice"
    assert last["activations"] == pytest.approx(first["activations"] / 2, rel=0.15), "half the layers, once"
    late = passing("p2", 1, DEEP, schedule="zero_bubble")
    assert late["activations"] == pytest.approx(first["activations"], rel=0.15)


def test_logits_are_on_the_last_stage_and_cut_over_the_vocabulary() -> None:
    wide = llama_card(vocab=20_000)
    one, first, last = (passing(*where, card=wide) for where in (("d1",), ("p2", 0), ("p2", 1)))
    assert "logits" not in first and last["logits"] == one["logits"] > 64 << 20
    assert passing("t2", card=wide)["logits"] == pytest.approx(one["logits"] / 2, rel=0.1)


def test_recompute_and_sequence_parallelism_save_activations() -> None:
    whole = passing("d1", card=DEEP)["activations"]
    assert passing("d1", card=DEEP, recompute=True)["activations"] < 0.4 * whole
    cut = passing("t2", card=DEEP)["activations"]
    assert 0.5 * whole < cut < 0.85 * whole, "what lies between the blocks is whole on both ranks"
    divided = passing("t2", card=DEEP, sequence_parallel=True)["activations"]
    assert 0.4 * whole < divided < 0.95 * cut, "but for the blocks' inputs"


# A model whose weights are large against what passes through it.
WIDE = llama_card(layers=4, hidden=1024, heads=8, kv_heads=8, intermediate=4096, vocab=100)
SHORT = load_graph(find_graph("grpo"), ["prompts=2", "samples=2", "max_new_tokens=2"])
SHORT = dataclasses.replace(SHORT, data=dataclasses.replace(SHORT.data, max_length=16))


def held(memory: Mapping[str, int]) -> dict[str, int]:
    """Without what passes, and the margin."""
    causes = ("weights", "offloaded", "masters", "optimizer", "gradients")
    return {cause: memory[cause] for cause in causes if cause in memory}


def test_what_is_offloaded_leaves_the_device_but_not_the_host() -> None:
    weights = WIDE.weight_bytes("bfloat16")
    kept = plan_of(WIDE, 1, graph=SHORT).memory[0]
    assert kept["weights"] == 2 * weights and kept["optimizer"] == 2 * kept["masters"] == 4 * weights
    assert plan_of(WIDE, 1, "ref=d1:offload", graph=SHORT).memory[0]["weights"] == 2 * weights
    both = ("ref=d1:offload", "train=d1:offload")
    away = plan_of(WIDE, 1, *both, graph=SHORT).memory[0]
    assert held(away) == held(kept) | {"weights": weights}, "the worst moment is training, when ref is away"
    host = plan_of(WIDE, 1, *both, kind="cpu", graph=SHORT).memory[0]
    assert held(host) == held(kept) | {"weights": weights, "offloaded": weights}, "it has no other memory"


def test_an_offloaded_optimizer_is_there_while_it_trains() -> None:
    memory = plan_of(WIDE, 2, "d1@0", "train=d1@1:offload", "ref=d1@1", graph=SHORT).memory
    assert "optimizer" in memory[1], "the worst moment is training itself"
    assert "optimizer" not in memory[0]


def test_what_is_freed_is_gone_on_any_device() -> None:
    """Rollout on t2 and training on d2: parts of their own, unless they are freed after use."""
    weights = WIDE.weight_bytes("bfloat16")
    for kind in ("cpu", "cuda"):
        kept = plan_of(WIDE, 2, "d2", "rollout=t2", kind=kind, graph=SHORT).memory[0]
        part = kept["weights"] - 2 * weights
        assert weights // 2 < part < 0.51 * weights
        freed = plan_of(WIDE, 2, "d2", "rollout=t2:free", kind=kind, graph=SHORT).memory[0]
        assert freed["weights"] == kept["weights"], "they are there at the rollout, beside the optimizer"
    away = plan_of(WIDE, 2, "d2", "rollout=t2:free", "train=d2:offload", graph=SHORT).memory[0]
    assert away["weights"] == 2 * weights and "offloaded" not in away, "the worst moment is training"


def test_what_is_freed_is_in_host_memory_until_its_first_use() -> None:
    """The critic's values come after the rollout, in the first step as in all."""
    ppo = load_graph(find_graph("ppo"), ["prompts=64", "max_new_tokens=1000"])
    layouts = ["d1@0", "values=d1@1:free", "rollout=d1@1:offload"]
    weights = WIDE.weight_bytes("bfloat16")
    found = {}
    for kind in ("cpu", "cuda"):
        plan = plan_of(WIDE, 2, *layouts, kind=kind, graph=ppo)
        assert plan.moments[1] == "rollout"
        found[kind] = plan.memory[1]
    assert found["cuda"]["weights"] == found["cpu"]["weights"] == weights, "the rollout's alone"
    assert found["cpu"]["offloaded"] == pytest.approx(weights, rel=1e-3), (
        "the host's memory is that of a CPU rank"
    )
    assert "offloaded" not in found["cuda"]
    kept = plan_of(WIDE, 2, *(text.replace(":free", "") for text in layouts), graph=ppo)
    assert kept.memory[1]["weights"] == pytest.approx(2 * weights, rel=1e-3)
    alone = plan_of(WIDE, 2, "d1@0", "values=d1@1:free", "train=d1@1:offload", graph=ppo).memory[1]["weights"]
    assert alone == weights, "training comes after the values"


def test_equal_holdings_are_counted_once() -> None:
    weights = CARD.weight_bytes("bfloat16")
    assert plan_of(CARD, 2).memory[0]["weights"] == 2 * weights, "actor and ref"
    apart = plan_of(CARD, 2, "d2", "ref=p2").memory[1]["weights"]
    assert weights < apart < 2 * weights


def test_buckets_are_where_weights_move() -> None:
    memory = plan_of(WIDE, 3, "d1@0", "train=d2@1-2", graph=SHORT).memory
    weights = WIDE.weight_bytes("bfloat16")
    assert [memory[rank]["buckets"] for rank in range(3)] == [min(64 << 20, weights)] * 3
    assert "buckets" not in plan_of(WIDE, 2, graph=SHORT).memory[0]


def test_a_plan_that_does_not_fit_names_the_cause_and_what_would_fit() -> None:
    def notes(gib: float) -> list[str]:
        cluster = Cluster((Node("local", 2, "cuda", int(gib * GIB)),))
        plan = make_plan(SHORT, cluster, {"*": "d2"}, dict.fromkeys(SHORT.models, WIDE))
        assert list(overfull(plan).values()) == ([[0, 1]] if gib < 2 else [])
        return [note for note in plan.notes if note.startswith("Memory: ")]

    first, second = notes(1.45)
    assert first.startswith("Memory: ranks 0-1 are expected to need 1.5 GiB of their 1.45 GiB at train,")
    assert first.endswith("process (0.6 GiB).")
    assert second == "Memory: d1t2p1 for all calls is expected to fit."
    assert "0.9 GiB more for each device would" in notes(0.6)[1]
    assert notes(8) == []


def test_the_smallest_change_comes_first() -> None:
    """Fewer tokens in the micro-batches of the call that needs most, then recompute."""

    def note(less: float, *layouts: str) -> str:
        total = sum(plan_of(DEEP, 1, *layouts).memory[0].values())
        cluster = Cluster((Node("local", 1, "cuda", total - int(less * (total - (600 << 20)))),))
        cards = dict.fromkeys(GRPO.models, DEEP)
        full = make_plan(GRPO, cluster, parse_layouts(layouts), cards, assume=Assumptions())
        return [text for text in full.notes if text.startswith("Memory: ")][1]

    assert note(0.01) == "Memory: 2048 tokens a micro-batch for train is expected to fit."
    both = "Memory: 128 tokens a micro-batch and recompute for train is expected to fit."
    assert note(0.5) == both, "neither alone"


@pytest.mark.parametrize(("layout", "tied"), [("d2", True), ("t2", True), ("p2", True), ("t2p2", False)])
def test_holdings_are_where_the_runtime_puts_them(layout: str, tied: bool) -> None:
    """`Parts` and the boxes that reallocation moves are the same."""
    card = llama_card(tied=tied)
    sizes = Layout.parse(layout)
    where = CallPlan(tuple(range(sizes.size)), sizes, "train")
    held = partition(card, sizes).holders(where.mesh)
    parts = Parts(GRPO, {"actor": card})
    for rank, holding in holdings(where).items():
        mine = sum(box_size(box) for boxes in held.values() for other, box in boxes if other == rank)
        assert parts.of("actor", holding).elements == mine
    assert parts.of("actor", Holding()).elements == card.size


def test_decode_graphs_that_must_be_captured_anew_are_said() -> None:
    """Weights that a rollout lets go of may come back elsewhere; a CPU captures nothing."""

    def notes(kind: str, *layouts: str) -> list[str]:
        return [note for note in plan_of(CARD, 4, *layouts, kind=kind).notes if "CUDA graphs" in note]

    (note,) = notes("cuda", "d4", "rollout=t2@0-1:offload")
    assert note.startswith("Graphs: rollout's weights may come back at another place")
    assert len(notes("cuda", "d4", "rollout=t2@0-1:free")) == 1
    assert notes("cpu", "d4", "rollout=t2@0-1:offload") == []
    assert notes("cuda", "d4", "rollout=t2@0-1") == []
    assert notes("cuda", "d4", "rollout=d4:offload") == [], "training keeps the same weights"
