"""What plans say of bytes is what models take: against real checkpoints, part by part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.callbytes import kv_bytes, training_bytes
from planner.loads import worst_load
from planner.sizes import Parts
from realflow.errors import InputError
from realflow.graph import find_graph, load_graph
from realflow.graph.types import Graph
from realflow.layout import Layout
from realflow.planfile import CallPlan
from realflow.planfile.holdings import holdings

GRPO = load_graph(find_graph("grpo"))
CASES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "uneven heads": ({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}, "lm",
                     ("d1", "t2", "t3", "p2", "t2p2")),
    "qwen3": ({"family": "qwen3", "tied": False}, "lm", ("t2", "t4", "p2")),
    "gemma3": ({"family": "gemma3"}, "lm", ("t2", "t2p2")),
    "biases": ({"family": "qwen2"}, "lm", ("t2p2",)),
    "value head": ({}, "value", ("t2", "p2")),
}  # fmt: skip


def graph_with(head: str, dtype: str) -> Graph:
    actor = dataclasses.replace(GRPO.models["actor"], head=head, dtype=dtype)  # type: ignore[arg-type]
    return dataclasses.replace(GRPO, models={"actor": actor})


def loaded(path: Path, layout: Layout, head: str, dtype: str) -> Iterator[tuple[int, Any]]:
    """Each rank's part, one after the other in this process: loading needs no collective."""
    from realflow.models.causal import load_model
    from realflow.models.place import Place, groups_of

    mesh = CallPlan(tuple(range(layout.size)), layout, "train").mesh
    groups: Any = dict.fromkeys(groups_of(mesh))
    for rank in mesh.ranks:
        yield rank, load_model(path, dtype=dtype, place=Place.of(mesh, rank, groups), head=head)


@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_those_of_loaded_models(tmp_path: Path, case: str) -> None:
    """Weights, gradients and KV cache of every rank: none less, and none more but what aligns them."""
    from tiny import tiny_model

    from realflow.engines.part import cache_shape
    from realflow.engines.shards import arrange
    from realflow.models.card import build

    changes, head, layouts = CASES[case]
    path = tiny_model(tmp_path / "model", **changes)
    graph, rollout = graph_with(head, "bfloat16"), GRPO.call("rollout")
    graph = dataclasses.replace(graph, data=dataclasses.replace(graph.data, max_length=48))
    parts = Parts(graph, {"actor": build(path)})
    for text in layouts:
        layout = Layout.parse(text)
        held = holdings(CallPlan(tuple(range(layout.size)), layout, "train"))
        for rank, model in loaded(path, layout, head, "bfloat16"):
            part = parts.of("actor", held[rank])
            elements = sum(slot.size for slot in model.flat.slots.values())
            assert part.elements == elements, (text, rank)
            stored = model.flat.storage.untyped_storage().nbytes()
            assert stored <= part.weight_bytes <= 1.02 * stored
            for dp in (1, 3):
                tied, partial = set(model.partition.tied), set(model.partition.partial())
                whole = {n for n in model.flat.slots if layout.tp > 1 and model.partition.is_whole(n)}
                held_here = set(model.flat.slots)
                arranged = arrange(
                    model.flat.slots, dp, tied=held_here & tied, partial=held_here & partial, whole=whole
                )
                bytes_of = training_bytes(part, dp)
                assert (
                    4 * arranged.total <= bytes_of["gradients"] <= 4 * (1.01 * arranged.total + 4 * 32 * dp)
                )
                assert bytes_of["optimizer"] == 2 * bytes_of["masters"] == 2 * bytes_of["gradients"] // dp
            if head == "lm":
                cache = cache_shape(model, slots=3, length=16 + 48)
                where = CallPlan((0,), Layout(), "native", slots=3)
                load = worst_load(graph, rollout, where, (48, 16), part.positions)
                assert kv_bytes(part, load) == cache.bytes(model.flat.storage.dtype), (text, rank)


def test_a_layout_that_is_refused_cannot_be_loaded_either(tmp_path: Path) -> None:
    from tiny import tiny_model

    from realflow.models.card import build
    from realflow.models.layouts import refusals

    path = tiny_model(tmp_path / "model")
    (reason,) = refusals(build(path), Layout(tp=5))
    with pytest.raises(InputError) as caught:
        next(loaded(path, Layout(tp=5), "lm", "bfloat16"))
    assert reason in str(caught.value)


def test_gradients_and_optimizer_states_follow_the_compute_dtype() -> None:
    from small_cards import llama_card

    card = llama_card()
    for dtype, size in (("bfloat16", 4), ("float32", 4), ("float64", 8)):
        part = Parts(graph_with("lm", dtype), {"actor": card}).of(
            "actor", holdings(CallPlan((0,), Layout(), "train"))[0]
        )
        shard, whole = size * -(-card.size // 64) * 32, size * -(-card.size // 64) * 64
        masters = (
            {"masters": shard} if dtype == "bfloat16" else {}
        )  # else the compute weights are the masters
        assert training_bytes(part, 2) == {**masters, "optimizer": 2 * shard, "gradients": whole}
