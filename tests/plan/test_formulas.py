"""The planner's formulas against what real modules compute and send."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from counting import RankModel, flops, recording
from formula_parts import FAMILIES, FULL, PRODUCTS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import SMALL
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from planner.decoder import Decoder, Layer, read_decoder, stage_cuts
from planner.formulas import (
    Cut,
    Pass,
    Phase,
    Traffic,
    decode_pass,
    ends_traffic,
    ends_work,
    gradient_traffic,
    layer_parts,
    layer_traffic,
    shares,
    stage_elements,
)
from realflow.engines.cut_sampling import Cut as CutVocabulary
from realflow.engines.cut_sampling import draw_cut
from realflow.engines.fused import FusedDecoder
from realflow.engines.part import Heads
from realflow.graph.types import Sampling
from realflow.layout import Layout, box_size, cut
from realflow.models.partition import partition, with_head


def product_flops(
    decoder: Decoder, where: Cut, one: Pass, phase: Phase, stage: tuple[int, int] | None = None
) -> Counter[str]:
    """FLOPs of products by component: of all layers, or of one stage's, and of the head."""
    found: Counter[str] = Counter()
    first, stop = stage or (0, len(decoder.layers))
    for kind, layers in decoder.kinds(first, stop).items():
        for name, work in layer_parts(decoder, kind, where, one, phase).items():
            found[name] += int(work.flops * layers)
    if stop == len(decoder.layers):
        found["head"] += int(ends_work(decoder, where, one, phase)["head"].flops)
    return Counter({name: number for name, number in found.items() if name in PRODUCTS})


def padded(decoder: Decoder, lengths: list[int]) -> Pass:
    """The pass as plain modules compute it: every query with every key, masked or not."""
    every = sum(length**2 for length in lengths)
    windowed = tuple((window, every) for window in decoder.windows)
    return Pass(sum(lengths), every, len(lengths), windowed)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_whole_models(family: str) -> None:
    """Dense, grouped queries, sliding windows and experts: forward and backward, to the last FLOP."""
    config = AutoConfig.for_model(family, **{**SMALL, **FULL, **FAMILIES[family]})
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(5, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    forward, output = flops(lambda: model(ids, use_cache=False).logits)
    backward, _ = flops(lambda: output.sum().backward())
    decoder = read_decoder(config.to_dict())
    one = padded(decoder, [12, 12, 12])
    for phase, counted in (("forward", forward), ("backward", backward)):
        parts = product_flops(decoder, Cut(), one, phase)  # type: ignore[arg-type]
        assert parts.total() == counted
        for name, number in parts.items():  # the control: no part may be left out
            assert abs(parts.total() - number - counted) > 1e-3 * counted, f"{name} would not be missed"


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3_text", "mixtral"])
def test_products_of_decoding(family: str) -> None:
    """A new token for 2 sequences of 20, whose sliding layers keep no more keys than their window."""
    config = AutoConfig.for_model(family, **{**SMALL, **FULL, **FAMILIES[family]})
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        cache = model(torch.full((2, 19), 7), use_cache=True).past_key_values
        counted, _ = flops(lambda: model(torch.full((2, 1), 8), past_key_values=cache, use_cache=True))
    decoder = read_decoder(config.to_dict())
    one = decode_pass([(20, 2)], decoder.windows)
    assert product_flops(decoder, Cut(), one, "decode").total() == counted


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", "d1"), ("llama", "t3"), ("llama", "p2"), ("qwen3", "t2"),
        ("gemma3", "t2p2"), ("gemma3", "t3"),
    ],
)  # fmt: skip
def test_products_and_messages_of_cut_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, layout: str
) -> None:
    """What the engine's own modules compute and send, in every stage: FLOPs of the busiest tensor rank, and
    each collective with its bytes, with and without sequence parallelism and recompute."""
    where, folder = Layout.parse(layout), tiny_model(tmp_path, family)
    decoder = read_decoder(json.loads((folder / "config.json").read_text()))
    one = padded(decoder, [12, 12, 12])
    for stage, layers in enumerate(stage_cuts(decoder, where.pp)):
        ranks = [RankModel(folder, where, stage * where.tp + t, [12, 12, 12]) for t in range(where.tp)]
        for sequence, recompute in product([False, True][: where.tp], [False, True]):
            counted = [rank.run(monkeypatch, sequence=sequence, recompute=recompute) for rank in ranks]
            here = Cut(t=where.tp, p=where.pp, sequence_parallel=sequence)
            phases_: dict[str, Phase] = {
                "forward": "forward",
                "backward": "recompute" if recompute else "backward",
            }
            for name, phase in phases_.items():
                expected = product_flops(decoder, here, one, phase, layers).total()
                assert max(rank.flops[name] for rank in counted) == expected
                messages = stage_messages(decoder, here, one, phase, layers, 4)
                for rank in counted:
                    assert rank.messages[name] == messages, (name, sequence, recompute)


def stage_messages(
    decoder: Decoder, where: Cut, one: Pass, phase: Phase, stage: tuple[int, int], itemsize: int
) -> Counter[tuple[str, int]]:
    found: Counter[tuple[str, int]] = Counter()

    def add(traffic: tuple[Traffic, ...], times: int = 1) -> None:
        for item in traffic:
            found[item.operation, int(item.bytes)] += int(item.count * times)

    for kind, layers in decoder.kinds(*stage).items():
        add(layer_traffic(decoder, kind, where, one, phase, itemsize), layers)
    ends = ends_traffic(decoder, where, one, phase, itemsize)
    if stage[0] == 0:
        add(ends["embedding"])
    if stage[1] == len(decoder.layers):
        add(ends["head"])
    return found


def test_a_value_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path)
    decoder = read_decoder(json.loads((folder / "config.json").read_text()), "value")
    one = padded(decoder, [12, 12])
    rank = RankModel(folder, Layout(tp=2), 0, [12, 12], head="value")
    for sequence in (False, True):
        found = rank.run(monkeypatch, sequence=sequence)
        where = Cut(t=2, sequence_parallel=sequence)
        every = (0, len(decoder.layers))
        for phase in ("forward", "backward"):
            messages = stage_messages(decoder, where, one, phase, every, 4)  # type: ignore[arg-type]
            assert found.messages[phase] == messages
            parts = product_flops(decoder, where, one, phase)  # type: ignore[arg-type]
            del parts["head"]  # a matrix with a vector: not counted by torch
            assert found.flops[phase] == parts.total()
    assert ends_work(decoder, Cut(), one, "forward")["head"].flops == 2 * 24 * 32


def test_products_and_messages_of_decoding_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused decoder of a tensor rank, but for attention itself, and drawing from its logits."""
    folder = tiny_model(tmp_path, "qwen3")
    decoder = read_decoder(json.loads((folder / "config.json").read_text()))
    model = RankModel(folder, Layout(tp=2), 1, [2]).model
    step = SimpleNamespace(
        slots=3,
        tokens=torch.tensor([5, 6, 7]),
        positions=torch.tensor([9, 9, 9]),
        attend=lambda index, query, pairs, **others: torch.zeros_like(query),
    )
    sent: Counter[tuple[str, int]] = Counter()

    def gather(mine: torch.Tensor) -> torch.Tensor:
        sent["all_gather", 2 * mine.numel() * mine.element_size()] += 1
        return torch.stack([mine, mine])

    with torch.no_grad(), recording(monkeypatch) as messages:
        counted, logits = flops(lambda: FusedDecoder(model)(step))
        draw_cut(
            logits, torch.full((3,), 0.5, dtype=torch.float64), Sampling(1), CutVocabulary(50, 1, gather)
        )
    one = decode_pass([(10, 3)])
    parts = product_flops(decoder, Cut(t=2), one, "decode")
    del parts["scores"]
    assert parts.total() == counted
    assert stage_messages(decoder, Cut(t=2), one, "decode", (0, 2), 4) == messages + sent


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 16))
def test_heads_of_the_busiest_rank_are_the_engine_s(kv: int, group: int, t: int) -> None:
    heads = kv * group
    t = min(t, heads)
    everyone = [
        Heads.of(heads, kv, cut(heads, t, index), (0, kv) if kv % t else cut(kv, t, index))
        for index in range(t)
    ]
    decoder = Decoder("llama", heads, heads, kv, 2, 10, 10, (Layer(intermediate=4),), True)
    found = shares(decoder, 0, Cut(t=t))
    assert found.used_kv_heads == max(rank.cached for rank in everyone)
    assert found.heads == max(rank.query for rank in everyone)
    assert found.held_kv_heads == everyone[0].computed


@pytest.mark.parametrize("head", ["lm", "value"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "starcoder2"])
def test_parameters_of_ranks_are_the_engine_s(tmp_path: Path, family: str, tied: bool, head: Any) -> None:
    """What a rank holds, what of it has its gradient summed over tensor ranks and over ends."""
    from realflow.models.card import build

    values = SMALL | {"num_hidden_layers": 4, "head_dim": 8}
    AutoConfig.for_model(family, **values, tie_word_embeddings=tied).save_pretrained(tmp_path)
    card = with_head(build(tmp_path), head)
    decoder = read_decoder(json.loads((tmp_path / "config.json").read_text()), head)
    for tp, pp in [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2), (4, 2)]:
        engine = partition(card, Layout(tp=tp, pp=pp))
        for index, (first, stop) in enumerate(stage_cuts(decoder, pp)):
            boxes = [engine.boxes(index, rank) for rank in range(tp)]
            held = [sum(map(box_size, rank.values())) for rank in boxes]
            where = Cut(t=tp, p=pp)
            assert stage_elements(decoder, where, first, stop) == max(held)
            for sequence in (False, True) if tp > 1 else (False,):
                where = Cut(t=tp, p=pp, sequence_parallel=sequence)
                partial, tables = set(engine.partial(sequence=sequence)), set(engine.tied)
                sums = {
                    (axis, ranks): sum(4 * box_size(box) for name, box in boxes[0].items() if name in names)
                    for axis, ranks, names in (("t", tp, partial), ("ends", 2, tables))
                }
                found = gradient_traffic(decoder, where, first, stop, data=3, itemsize=2)
                said = {(one.axis, one.ranks): one.bytes for one in found if one.operation == "all_reduce"}
                assert said == {key: size for key, size in sums.items() if size}, (tp, pp, index, sequence)
                reduced, gathered = (
                    [one.bytes for one in found if one.operation == what and one.ranks == 3]
                    for what in ("reduce_scatter", "all_gather")
                )
                assert reduced == [4 * max(held)] and gathered == [2 * max(held)]
