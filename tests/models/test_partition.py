"""How models are cut: every element has its place, stages are balanced, and refusals say why."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_config
from transformers import CONFIG_MAPPING

from realflow.errors import InputError
from realflow.layout import DeviceMesh, Layout, box_size
from realflow.models.card import Card, Parameter, build
from realflow.models.partition import SUMMED, Partition, partition, stages, with_head

PLAN = {
    **{f"model.layers.*.self_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")},
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.self_attn.q_norm": SUMMED,
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": "colwise_gather_output",
}


def card_of(
    heads: int = 6,
    groups: int = 2,
    intermediate: int = 13,
    vocab: int = 17,
    layers: int = 3,
    tied: bool = True,
) -> Card:
    """A Llama-like card with biases everywhere."""
    width, hidden, kv = 2, 5, heads // groups
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(layers):
        layer = f"model.layers.{index}"
        sizes = {
            "self_attn.q_proj": (heads * width, hidden),
            "self_attn.k_proj": (kv * width, hidden),
            "self_attn.v_proj": (kv * width, hidden),
            "self_attn.o_proj": (hidden, heads * width),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        for name, shape in sizes.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        shapes |= {f"{layer}.self_attn.q_norm.weight": (width,), f"{layer}.input_layernorm.weight": (hidden,)}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return Card(
        hash="0" * 16,
        architecture="TestForCausalLM",
        model_type="test",
        parameters=tuple(Parameter(name, shape, "float32") for name, shape in shapes.items()),
        tied={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv,
        head_dim=width,
        vocab=vocab,
        max_positions=64,
        tensor_styles=PLAN,
        pipeline_styles={"model.embed_tokens": (("input_ids",), ("inputs_embeds",))},
    )


@st.composite
def cuts(draw: st.DrawFn) -> Partition:
    groups, kv = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    heads = groups * kv
    layers = draw(st.integers(1, 6))
    made = card_of(
        heads, groups, draw(st.integers(1, 20)), draw(st.integers(1, 30)), layers, draw(st.booleans())
    )
    tp = draw(st.integers(1, 8))
    assume(tp <= min(heads, made.intermediate, made.vocab))
    head = draw(st.sampled_from(["lm", "value"]))
    return partition(with_head(made, head), Layout(draw(st.integers(1, 2)), tp, draw(st.integers(1, layers))))


@settings(deadline=None)
@given(cuts())
def test_every_element_is_held_once_over_tp_and_by_one_stage(cut: Partition) -> None:
    stages_of: dict[str, list[int]] = {}
    for pp in range(cut.pp):
        held = [cut.boxes(pp, tp) for tp in range(cut.tp)]
        assert all(list(boxes) == list(held[0]) for boxes in held)
        for parameter in cut.card.parameters:
            if parameter.name not in held[0]:
                continue
            stages_of.setdefault(parameter.name, []).append(pp)
            boxes = [box[parameter.name] for box in held]
            if cut.is_whole(parameter.name):
                assert all(box_size(box) == parameter.size for box in boxes)
                continue
            assert sum(box_size(box) for box in boxes) == parameter.size
            assert all(box_size(box) > 0 for box in boxes) or parameter.size < cut.tp
            spans = [
                next(s for s, n in zip(box, parameter.shape, strict=True) if s != (0, n)) for box in boxes
            ]
            assert [b for _, b in spans[:-1]] == [a for a, _ in spans[1:]]  # end to end, in order of rank
    for parameter in cut.card.parameters:
        ends = [0, cut.pp - 1] if parameter.name in cut.tied else stages_of[parameter.name][:1]
        assert stages_of[parameter.name] == ends


@settings(deadline=None)
@given(cuts())
def test_heads_are_whole_and_find_their_keys(cut: Partition) -> None:
    groups = cut.card.heads // cut.card.kv_heads
    seen: list[int] = []
    for tp in range(cut.tp):
        heads, (first, stop) = range(*cut.query_heads(tp)), cut.kv_heads(tp)
        assert len(heads) > 0
        seen += heads
        picks = cut.kv_picks(tp)
        used = list(range(stop - first)) if picks is None else list(picks)
        assert len(heads) % len(used) == 0
        for place, head in enumerate(heads):
            assert first + used[place // (len(heads) // len(used))] == head // groups
    assert seen == list(range(cut.card.heads))


@settings(deadline=None)
@given(cuts(), st.integers(1, 3), st.integers(0, 50))
def test_holders_are_the_ranks_of_the_mesh(cut: Partition, dp: int, first: int) -> None:
    layout = Layout(dp, cut.tp, cut.pp)
    mesh = DeviceMesh(tuple(range(first, first + layout.size)), layout)
    holders = cut.holders(mesh)
    assert list(holders) == [p.name for p in cut.card.parameters]
    for rank in mesh.ranks:
        place = mesh.coordinate(rank)
        boxes = cut.boxes(place["pp"], place["tp"])
        assert {n: box for n, held in holders.items() for r, box in held if r == rank} == boxes


@settings(deadline=None)
@given(st.integers(1, 8), st.data(), st.booleans(), st.integers(1, 60), st.integers(1, 200))
def test_the_slowest_stage_is_as_fast_as_can_be(
    layers: int, data: st.DataObject, tied: bool, intermediate: int, vocab: int
) -> None:
    card = card_of(layers=layers, tied=tied, intermediate=intermediate, vocab=vocab)
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=layers, max_size=layers))
    card = replace(  # layers of different sizes
        card,
        parameters=tuple(
            replace(p, shape=(sizes[int(p.name.split(".")[2])],)) if "input_layernorm" in p.name else p
            for p in card.parameters
        ),
    )
    count = data.draw(st.integers(1, layers))
    found = stages(card, count)
    assert [stage.first for stage in found] == [0, *(stage.stop for stage in found[:-1])]
    assert found[-1].stop == layers and all(stage.first < stage.stop for stage in found)
    assert [s.embeds for s in found] == [i == 0 for i in range(count)]
    assert [s.ends for s in found] == [i == count - 1 for i in range(count)]

    def slowest(ends: tuple[int, ...]) -> int:
        costs = [0] * count
        bounds = list(itertools.pairwise((0, *ends)))
        for parameter in card.parameters:
            if ".layers." in parameter.name:
                layer = int(parameter.name.split(".")[2])
                costs[next(i for i, (a, b) in enumerate(bounds) if a <= layer < b)] += parameter.size
            elif tied or "embed" not in parameter.name:
                costs[-1] += parameter.size
        costs[0] += card.hidden
        return max(costs)

    choices = ((*c, layers) for c in itertools.combinations(range(1, layers), count - 1))
    assert slowest(tuple(stage.stop for stage in found)) == min(map(slowest, choices))


def test_what_must_be_summed_over_tensor_ranks() -> None:
    layers = range(3)
    norms = {f"model.layers.{i}.self_attn.q_norm.weight" for i in layers}
    shared = {
        f"model.layers.{i}.self_attn.{n}_proj.{k}" for i in layers for n in "kv" for k in ("weight", "bias")
    }
    between = {
        f"model.layers.{i}.{n}" for i in layers for n in ("input_layernorm.weight", "self_attn.o_proj.bias")
    }
    between |= {f"model.layers.{i}.mlp.down_proj.bias" for i in layers} | {"model.norm.weight"}
    value = with_head(card_of(), "value")
    assert set(partition(value, Layout(tp=3)).partial()) == norms
    assert set(partition(value, Layout(tp=2)).partial()) == norms | shared
    assert set(partition(value, Layout(tp=2)).partial(sequence=True)) == norms | shared | between
    for tp in (1, 2, 3):
        names = partition(value, Layout(tp=tp)).partial(sequence=True)
        assert list(names) == sorted(names) and ("score.weight" not in names)
    assert partition(card_of(), Layout(pp=2)).tied == ("model.embed_tokens.weight",)
    assert partition(card_of(), Layout()).tied == partition(card_of(tied=False), Layout(pp=2)).tied == ()


def test_value_heads_replace_the_language_model_head() -> None:
    for tied in (True, False):
        card = with_head(card_of(tied=tied), "reward")
        assert card.parameters[-1] == Parameter("score.weight", (1, card.hidden), "float32")
        assert not card.tied and Counter(p.name for p in card.parameters)["lm_head.weight"] == 0
        cut = partition(card, Layout(tp=2, pp=2))
        assert (
            cut.boxes(1, 0)["score.weight"] == cut.boxes(1, 1)["score.weight"] == ((0, 1), (0, card.hidden))
        )
        assert "score.weight" not in cut.boxes(0, 0) and "model.embed_tokens.weight" not in cut.boxes(1, 0)


# ------------------------------------------------------------------ refusals


def changed(card: Card, styles: dict[str, str] | None = None, **shapes: tuple[int, ...]) -> Card:
    """Another plan, and more parameters in each layer (`__` for the dots of their names)."""
    more = [
        Parameter(f"model.layers.{i}.{name.replace('__', '.')}.weight", shape, "float32")
        for i in range(card.layers)
        for name, shape in shapes.items()
    ]
    plan = card.tensor_styles if styles is None else {**card.tensor_styles, **styles}
    return replace(card, parameters=(*card.parameters, *more), tensor_styles=plan)


@pytest.mark.parametrize(
    ("card", "layout", "message"),
    [
        (card_of(), "t7", r"6 attention heads; t7 needs at least 7: use t1 to t6"),
        (card_of(vocab=4), "t5", r"4 token ids.* use t1 to t4"),
        (card_of(intermediate=3), "t4", r"3 columns of its MLP.* use t1 to t3"),
        (card_of(), "p4", r"3 layers; p4 needs at least 4: use p1 to p3"),
        (replace(card_of(), tensor_styles={}), "t2", r"publishes no tensor plan .*use t1"),
        (replace(card_of(), pipeline_styles={}), "p2", r"no pipeline plan .*use p1"),
        (
            changed(card_of(), {"model.layers.*.mlp.experts": "moe_tp_experts"}, mlp__experts=(4, 5, 5)),
            "t2",
            r"style 'moe_tp_experts' \(at model.layers.0.mlp.experts\), which is not supported: use t1",
        ),
        (changed(card_of(), mlp__act__alpha=(1,)), "t2", r"mlp.act.alpha.weight stands among cut layers"),
        (changed(card_of(), mixer__proj=(5, 5)), "t2", r"mixer.proj.weight has no place in the tensor plan"),
        (
            changed(card_of(), {"model.layers.*.wide_norm": SUMMED}, wide_norm=(5,)),
            "t2",
            r"wide_norm.weight is to be summed, but is no norm of heads",
        ),
        (
            changed(card_of(), {"model.layers.*.self_attn.gate": "colwise"}, self_attn__gate=(4, 5)),
            "t2",
            r"attention of other parts than q_proj",
        ),
        (
            changed(
                card_of(),
                {"model.layers.*.side.both": "colwise", "model.layers.*.side.down": "rowwise"},
                side__both=(8, 5),
                side__down=(5, 4),
            ),
            "t2",
            r"side has fused or unequal parts \(both, down\)",
        ),
        (
            changed(card_of(), {"model.layers.*.fc": "colwise"}, fc=(8, 5)),
            "t2",
            r"model.layers.0 has parts \(fc\) that are no block",
        ),
        (replace(card_of(), head_dim=4), "t2", r"is to be summed|in whole heads"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_its_reason(card: Card, layout: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        partition(card, Layout.parse(layout))
    assert all(problem.where == "layout" for problem in caught.value.problems)
    partition(card, Layout(dp=4))  # what the message says works


def tiny_card(tmp_path: Path, kind: str) -> Card:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "pad_token_id": 0,
    }
    fields = CONFIG_MAPPING[kind].__dataclass_fields__
    CONFIG_MAPPING[kind](**{key: value for key, value in sizes.items() if key in fields}).save_pretrained(
        tmp_path
    )
    return build(tmp_path)


@pytest.mark.parametrize(
    ("kind", "layout", "message"),
    [
        ("mixtral", "t2", "moe_tp_experts"),
        ("qwen3_moe", "t2", "moe_tp_experts"),
        ("gpt_neox", "t2", r"fused attention parts \(dense, query_key_value\)"),
        ("phi3", "t2", "style '(colwise_gather_output|rowwise_split_input)'"),
        ("olmo2", "t2", "colwise_gather_output"),
        ("diffllama", "t2", "has no place in the tensor plan"),
        ("diffllama", "p2", "publishes no pipeline plan"),
        ("olmo", "p2", "publishes no pipeline plan"),  # its last norm has no weights, and so no stage
    ],
)
def test_families_that_cannot_be_cut(tmp_path: Path, kind: str, layout: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        partition(tiny_card(tmp_path, kind), Layout.parse(layout))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_that_can(tmp_path: Path, family: str) -> None:
    tiny_config(family, num_hidden_layers=2).save_pretrained(tmp_path)
    card = build(tmp_path)
    for tp, pp in itertools.product((1, 2, 3, 4), (1, 2)):
        cut = partition(card, Layout(1, tp, pp))
        held = sum(box_size(b) for p in range(pp) for t in range(tp) for b in cut.boxes(p, t).values())
        whole = sum(p.size for p in card.parameters if cut.is_whole(p.name)) * (tp - 1)
        twice = sum(math.prod(p.shape) for p in card.parameters if p.name in cut.tied)
        assert held == card.size + whole + twice
