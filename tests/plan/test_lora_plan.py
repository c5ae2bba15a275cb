"""Plans for models of which adapters alone are trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cards import llama_card
from tiny import tiny_model

from planner import make_plan, parse_layouts
from planner.adapters import decoder_low, low_of
from planner.callbytes import training_bytes
from planner.decoder import read_decoder, stage_cuts
from planner.formulas.values import Cut
from planner.sizes import part_of
from realflow.engines.shards import arrange
from realflow.engines.train import TrainEngine
from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph
from realflow.graph.types import Graph, LoraSpec, OptimizerSpec
from realflow.layout import Layout, lengths
from realflow.models.adapters import adapter_cut
from realflow.models.causal import load_model
from realflow.models.flat import FlatBuffer, slots_of
from realflow.models.lora import AdapterSource
from realflow.models.partition import partition
from realflow.planfile import Cluster, Node
from realflow.planfile.holdings import Holding

GRPO = load_graph(find_graph("grpo"))
SPEC = LoraSpec(8, 16)


def with_lora(spec: LoraSpec | None) -> Graph:
    actor = dataclasses.replace(GRPO.models["actor"], lora=spec)
    return dataclasses.replace(GRPO, models={**GRPO.models, "actor": actor})


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_states_are_those_of_the_engine(tmp_path: Path, dtype: str) -> None:
    """Counted and held: masters, moments and gradients of the adapters, to the byte."""
    path = tiny_model(tmp_path / "model", dtype=dtype)
    model = load_model(path, dtype=dtype, adapters=AdapterSource(SPEC))
    engine = TrainEngine(model, OptimizerSpec())
    held = [tensor for shard in engine.masters.shards() for tensor in shard.tensors.values()]
    kinds = {kind for shard in engine.masters.shards() for kind in shard.tensors}
    assert kinds == {"master", "exp_avg", "exp_avg_sq"}
    size = 8 if dtype == "float64" else 4
    each = sum(tensor.numel() for tensor in held) // 3 * size
    part = part_of(partition(model.partition.card, Layout()), Holding(), dtype, "lm", SPEC)
    found = training_bytes(part, 1)
    assert found["optimizer"] == 2 * each
    assert found.get("masters", 0) == (0 if dtype == "float64" else each)
    assert found["gradients"] == engine._gradients.data.untyped_storage().nbytes() == each
    assert part.weight_bytes == model.flat.storage.untyped_storage().nbytes()
    # the control: of the whole model there is more
    whole = part_of(partition(model.partition.card, Layout()), Holding(), dtype, "lm")
    assert training_bytes(whole, 1)["optimizer"] > 2 * found["optimizer"]
    engine.close()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(4, 2), (8, 2), (6, 3)]),
    st.sampled_from(["d1", "d2", "t2", "t3", "p2", "d3t2", "d2p2", "t2p2"]),
    st.integers(1, 20),
    st.sampled_from([(), ("q_proj", "v_proj"), ("down_proj",)]),
)
def test_every_rank_needs_what_is_counted(
    heads: tuple[int, int], text: str, rank: int, targets: tuple[str, ...]
) -> None:
    """Never less, and but a few units of alignment more, under any layout."""
    layout = Layout.parse(text)
    cut = partition(llama_card(4, heads[0] * 4, *heads), layout)
    spec = LoraSpec(rank, 1.0, targets)
    low = adapter_cut(cut, spec)
    for pp in range(layout.pp):
        for tp in range(layout.tp):
            base = {name: lengths(box) for name, box in cut.boxes(pp, tp).items()}
            own = {name: lengths(box) for name, box in low.boxes(pp, tp).items()}
            slots, total = slots_of(base | own)
            mine = FlatBuffer(None, slots).only(own).slots  # type: ignore[arg-type]
            arranged = arrange(mine, layout.dp, partial=own.keys() & set(low.partial()))
            moments = max(sum(run.size for run in arranged.owned(dp)) for dp in range(layout.dp))
            holding = Holding(pp, layout.pp, tp, layout.tp)
            part = part_of(cut, holding, "bfloat16", "lm", spec)
            found, spare = training_bytes(part, layout.dp), 4 * layout.dp * 32 * 3 + 4 * 31 * len(own)
            assert 8 * moments <= found["optimizer"] <= 8 * moments + 2 * spare
            assert 4 * arranged.total <= found["gradients"] <= 4 * arranged.total + spare
            assert 0 <= part.weight_bytes - 2 * total <= 64 * len(slots)


@pytest.mark.parametrize("text", ["d1", "t2", "t3", "p2", "t2p2"])
@pytest.mark.parametrize("targets", [(), ("k_proj", "o_proj"), ("gate_proj",)])
def test_configs_tell_of_adapters_what_cards_tell(text: str, targets: tuple[str, ...]) -> None:
    layout, spec = Layout.parse(text), LoraSpec(4, 1.0, targets)
    card = llama_card(4, 24, 6, 3)
    config = {
        "model_type": "llama",
        "hidden_size": card.hidden,
        "intermediate_size": card.intermediate,
        "num_hidden_layers": card.layers,
        "num_attention_heads": card.heads,
        "num_key_value_heads": card.kv_heads,
        "vocab_size": card.vocab,
        "max_position_embeddings": card.max_positions,
        "hidden_act": "silu",
    }
    decoder = read_decoder(config)
    cut = adapter_cut(partition(card, layout), spec)
    for pp, (first, stop) in enumerate(stage_cuts(decoder, layout.pp)):
        most = [low_of(cut, Holding(pp, layout.pp, tp, layout.tp)) for tp in range(layout.tp)]
        found = decoder_low(decoder, Cut(layout.tp, layout.pp), first, stop, spec)
        assert found.layers == most[0].layers
        assert max(low.stored for low in most) <= found.stored <= 1.1 * max(low.stored for low in most)
        assert found.partial == max(low.partial for low in most)


# ---------------------------------------------------------------- plans


def test_a_plan_has_states_of_the_adapters_alone() -> None:
    card, cluster = llama_card(8, 128, 4, 2), Cluster((Node("local", 2, "cpu", 8 << 30),))
    layouts = parse_layouts(["d2"])
    plans = [
        make_plan(graph, cluster, layouts, dict.fromkeys(GRPO.models, card))
        for graph in (with_lora(None), with_lora(SPEC))
    ]
    whole, low = (plan.memory[0] for plan in plans)
    assert low["optimizer"] < whole["optimizer"] / 5 and low["gradients"] < whole["gradients"] / 5
    assert whole["weights"] < low["weights"] < 1.2 * whole["weights"]
    assert plans[1].graph.models["actor"].lora == SPEC
    assert not plans[1].reallocs  # one layout: adapters are active where they are


# ---------------------------------------------------------------- graphs

ACTOR = '    optimizer: {name: adamw, lr: "${lr}"}\n'


def grpo_with(tmp_path: Path, lora: str, *, optimizer: bool = True) -> Path:
    text = find_graph("grpo").read_text()
    assert ACTOR in text
    path = tmp_path / "low.yaml"
    path.write_text(text.replace(ACTOR, (ACTOR if optimizer else "") + f"    lora: {lora}\n"))
    return path


def test_a_graph_says_what_is_trained(tmp_path: Path) -> None:
    graph = load_graph(grpo_with(tmp_path, "{rank: 16}"))
    assert graph.models["actor"].lora == LoraSpec(16, 32.0)
    assert graph.models["ref"].lora is None
    text = "{rank: 2, alpha: 3, targets: [q_proj, v_proj], save: merged}"
    graph = load_graph(grpo_with(tmp_path, text))
    spec = graph.models["actor"].lora
    assert spec == LoraSpec(2, 3.0, ("q_proj", "v_proj"), "merged") and spec.scale == 1.5
    mapping = graph_to_mapping(graph)["models"]["actor"]["lora"]
    assert mapping == {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "v_proj"], "save": "merged"}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{alpha: 3}", "'rank' is missing"),
        ("{rank: 0}", "found 0, expected"),
        ("{rank: 4, alpha: 0}", "a number above 0"),
        ("{rank: 4, dropout: 0.1}", "unknown key 'dropout'"),
        ("{rank: 4, save: both}", "expected one of adapters, merged"),
    ],
)
def test_what_adapters_cannot_be(tmp_path: Path, lora: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_graph(grpo_with(tmp_path, lora))


def test_adapters_that_nobody_trains_are_refused(tmp_path: Path) -> None:
    text = find_graph("grpo").read_text()
    ref = "  ref:    # the same model, as it was at the start\n"
    assert ref in text
    path = tmp_path / "frozen.yaml"
    path.write_text(text.replace(ref, ref + "    lora: {rank: 4}\n"))
    with pytest.raises(InputError, match=r"models\.ref\.lora: no call trains 'ref'"):
        load_graph(path)
