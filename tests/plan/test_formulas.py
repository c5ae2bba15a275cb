"""The planner's formulas against what real modules compute and send."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from counting import RankModel, flops, recording
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import EXPERTS, SMALL, published
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from planner.decoder import Decoder, Layer, read_decoder, stage_cuts
from planner.formulas import (
    KEPT_LOGITS,
    PHASES,
    Cut,
    Pass,
    Phase,
    Traffic,
    Work,
    decode_pass,
    ends_elements,
    ends_traffic,
    ends_work,
    expert_elements,
    gradient_traffic,
    layer_elements,
    layer_parts,
    layer_traffic,
    layer_work,
    pairs,
    pass_of,
    shares,
    stage_elements,
    stage_traffic,
    used_kv_heads,
)
from realflow.engines.cut_sampling import Cut as CutVocabulary
from realflow.engines.cut_sampling import draw_cut
from realflow.engines.fused import FusedDecoder
from realflow.engines.part import Heads
from realflow.graph.types import Sampling
from realflow.layout import Layout, box_size, cut
from realflow.models.attention import visible
from realflow.models.logprobs import KEEP_BYTES
from realflow.models.partition import partition, with_head

PRODUCTS = {
    "qkv", "scores", "out", "gate_up", "up", "down", "router", "experts", "shared_gate_up", "shared_down",
    "shared_gate", "head",
}  # fmt: skip
"""What `FlopCounterMode` counts; softmax, norms and the like are no products."""

FULL = {"num_hidden_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "qwen2": {},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 3},
    "starcoder2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1]},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
}


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


@given(st.integers(1, 60), st.integers(1, 70) | st.none())
def test_pairs_are_those_of_the_mask(length: int, window: int | None) -> None:
    assert pairs(length, window) == visible(length, window, torch.device("cpu")).sum()


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 4)), min_size=1, max_size=5))
def test_passes_add_up_over_sequences(lengths: list[tuple[int, int]]) -> None:
    one = pass_of(lengths, (8,))
    each = [length for length, times in lengths for _ in range(times)]
    assert (one.tokens, one.sequences, one.head_rows) == (sum(each), len(each), sum(each))
    assert one.seen(None) == sum(map(pairs, each)) and one.seen(8) == sum(pairs(n, 8) for n in each)
    step = decode_pass(lengths, (8,))
    assert (step.tokens, step.pairs, step.seen(8)) == (len(each), sum(each), sum(min(n, 8) for n in each))
    with pytest.raises(KeyError, match="window 9"):
        one.seen(9)


cuts = st.builds(
    Cut,
    t=st.sampled_from([1, 2, 3, 4, 8]),
    c=st.sampled_from([1, 2, 4]),
    e=st.sampled_from([1, 2, 4]),
    sequence_parallel=st.booleans(),
)
decoders = st.sampled_from(
    [read_decoder(published(name)) for name in
     ("qwen2.5-1.5b", "gemma-2-9b", "mixtral-8x7b", "qwen3-235b-a22b", "llama-2-7b")]
    + [read_decoder({"model_type": "qwen2_moe", **SMALL, **FAMILIES["qwen2_moe"]}),
       read_decoder({"model_type": "starcoder2", **SMALL})]
)  # fmt: skip
phases = st.sampled_from(PHASES)


@settings(max_examples=20, deadline=None)
@given(decoders, cuts, phases, st.sampled_from([2, 4]))
def test_numbers_are_those_of_the_expressions(
    decoder: Decoder, where: Cut, phase: Phase, itemsize: int
) -> None:
    """The compiled numbers, against sympy's own evaluation with what each symbol is said to mean."""
    import sympy

    from planner.formulas import parts, symbols

    one = pass_of([(300, 2), (70, 3)], decoder.windows, rows=500)
    known = symbols.meanings(sequence_parallel=where.sequence_parallel and phase != "decode",
                             decode=phase == "decode")  # fmt: skip
    for kind in decoder.kinds():
        layer = decoder.layers[kind]
        values = {
            symbols.tokens: one.tokens, symbols.pairs: one.seen(layer.window), symbols.context: 0,
            symbols.head_rows: one.head_rows, symbols.heads: decoder.heads,
            symbols.kv_heads: decoder.kv_heads, symbols.intermediate: layer.intermediate,
            symbols.shared: layer.shared_columns, symbols.expert: layer.expert_columns,
            symbols.experts: max(1, layer.experts), symbols.vocab: decoder.vocab,
            symbols.t: where.t, symbols.c: where.c, symbols.e: where.e,
            symbols.b: itemsize, symbols.H: decoder.hidden, symbols.D: decoder.head_dim,
            symbols.u: used_kv_heads(decoder.heads, decoder.kv_heads, where.t), symbols.k: layer.active,
        }  # fmt: skip
        given_ = {symbol: meaning.value.subs(values) for symbol, meaning in known.items()
                  if meaning.value is not None}  # fmt: skip
        expected = parts.layer_costs(parts.shape_of(decoder, layer), phase)
        found = layer_parts(decoder, kind, where, one, phase, itemsize)
        assert list(found) == list(expected)
        for name, cost in expected.items():
            for what in ("flops", "read", "written"):
                exact = float(sympy.sympify(getattr(cost, what)).subs(given_).subs(values))
                assert math.isclose(getattr(found[name], what), exact, rel_tol=1e-9, abs_tol=1e-9), name


@settings(max_examples=60, deadline=None)
@given(decoders, cuts, phases)
def test_a_layer_is_the_sum_of_its_parts(decoder: Decoder, where: Cut, phase: Phase) -> None:
    one = pass_of([(300, 2), (70, 3)], decoder.windows)
    for kind in decoder.kinds():
        total = sum(layer_parts(decoder, kind, where, one, phase).values(), Work())
        whole = layer_work(decoder, kind, where, one, phase)
        for what in ("flops", "read", "written", "bytes"):
            assert math.isclose(getattr(whole, what), getattr(total, what), rel_tol=1e-9)
        assert whole.flops > 0 and whole.read > 0 and whole.written > 0


@settings(max_examples=60, deadline=None)
@given(decoders, cuts, phases, st.integers(1, 400))
def test_more_work_never_costs_less(decoder: Decoder, where: Cut, phase: Phase, length: int) -> None:
    """More tokens, wider numbers: more of everything. More ranks: no rank computes more, but where key and
    value heads divide no longer, so that each rank has all of them."""
    one, more = (pass_of([(n, 2)], decoder.windows) for n in (length, length + 1))
    wider = Cut(t=2 * where.t, c=where.c, e=where.e, sequence_parallel=where.sequence_parallel)
    for kind in decoder.kinds():
        here = layer_work(decoder, kind, where, one, phase)
        assert layer_work(decoder, kind, where, more, phase).flops > here.flops
        assert layer_work(decoder, kind, where, more, phase).bytes > here.bytes
        assert layer_work(decoder, kind, where, one, phase, 4).read > here.read
        if decoder.kv_heads % where.t or decoder.kv_heads % wider.t == 0:
            assert layer_work(decoder, kind, wider, one, phase).flops <= here.flops
            assert layer_elements(decoder, kind, wider) <= layer_elements(decoder, kind, where)


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


def test_context_ranks_divide_tokens_and_pass_keys_round() -> None:
    decoder = read_decoder(published("llama-3-8b"))
    one = pass_of([(8192, 4)])
    for phase in ("forward", "backward"):
        alone = layer_parts(decoder, 0, Cut(t=2), one, phase)  # type: ignore[arg-type]
        four = layer_parts(decoder, 0, Cut(t=2, c=4), one, phase)  # type: ignore[arg-type]
        for name in PRODUCTS & set(alone):
            assert four[name].flops == alone[name].flops / 4
    keys = 2 * (one.tokens / 4) * 4 * 128  # of 8 heads over t2
    forward, backward = (
        [t for t in layer_traffic(decoder, 0, Cut(t=2, c=4), one, phase) if t.axis == "c"]  # type: ignore[arg-type]
        for phase in ("forward", "backward")
    )
    assert forward == [Traffic("p2p", "c", 4, 2 * keys, 3)]
    assert backward == [Traffic("p2p", "c", 4, 2 * keys, 3), Traffic("p2p", "c", 4, 4 * keys, 4)]
    step = decode_pass([(8000, 16)])
    parts = layer_parts(decoder, 0, Cut(c=4), step, "decode")
    whole = layer_parts(decoder, 0, Cut(), step, "decode")
    assert parts["scores"].flops == whole["scores"].flops / 4 and parts["qkv"] == whole["qkv"]


def test_expert_ranks_divide_experts_and_exchange_tokens() -> None:
    decoder = read_decoder(published("qwen3-235b-a22b"))
    where, one = Cut(t=2, e=8), pass_of([(2048, 4)])
    parts, alone = (layer_parts(decoder, 0, c, one, "forward") for c in (where, Cut(t=2)))
    assert parts["experts"].flops == alone["experts"].flops, "as many pairs come as are sent away"
    assert expert_elements(decoder, 0, where) * 8 == expert_elements(decoder, 0, Cut(t=2))
    sent = [t for t in layer_traffic(decoder, 0, where, one, "forward") if t.axis == "e"]
    assert sent == [Traffic("all_to_all", "e", 8, 8192 * 8 * 4096 * 2, 2)]
    assert sent[0].sent == 2 * (7 / 8) * 8192 * 8 * 4096 * 2
    reduced = [t for t in gradient_traffic(decoder, where, 0, 94, data=16) if t.operation == "reduce_scatter"]
    assert [t.ranks for t in reduced] == [16, 2], "experts: over the ranks that have the same ones"
    assert sum(t.bytes for t in reduced) == 4 * stage_elements(decoder, where, 0, 94)


@pytest.mark.parametrize(("tokens", "e"), [(1, 1), (4, 1), (4, 4), (32, 2), (1000, 1)])
def test_experts_that_decoding_touches(tokens: int, e: int) -> None:
    """The expected number of distinct experts of a rank, against draws."""
    layer = Layer(experts=16, active=3, expert_columns=8)
    decoder = Decoder("mixtral", 32, 4, 2, 8, 100, 64, (layer,), True)
    draw = random.Random(0)
    seen = [
        len({x for _ in range(tokens * e) for x in draw.sample(range(16), 3) if x < 16 // e})
        for _ in range(2000 if tokens < 100 else 20)
    ]
    weights, inside = 3 * 32 * 8, tokens * 3 * (32 + 3 * 8)
    read = layer_parts(decoder, 0, Cut(e=e), decode_pass([(9, tokens)]), "decode", 1)["experts"].read
    assert (read - inside) / weights == pytest.approx(sum(seen) / len(seen), rel=0.03)


def test_decoding_reads_the_cache_and_prefill_does_not() -> None:
    decoder = read_decoder(published("gemma-2-9b"))
    step = decode_pass([(6000, 8)], decoder.windows)
    sliding, full = (layer_parts(decoder, kind, Cut(), step, "decode")["scores"].read for kind in (0, 1))
    queries = 8 * 16 * 256 * 2
    assert full == queries + 8 * 6000 * 2 * 8 * 256 * 2
    assert sliding == queries + 8 * 4096 * 2 * 8 * 256 * 2
    prefill = pass_of([(6000, 8)], decoder.windows)
    goes_on = Pass(1000, 1e6, 2, ((4096, 1e6),), context=20_000)
    for kind, read in ((0, 2 * 4095), (1, 20_000)):
        keys = 2 * 8 * 256 * 2
        assert layer_parts(decoder, kind, Cut(), prefill, "forward")["scores"].read == 48_000 * (
            16 * 256 * 2 + keys
        )
        found = layer_parts(decoder, kind, Cut(), goes_on, "forward")["scores"].read
        assert found == 1000 * 16 * 256 * 2 + (1000 + read) * keys


def test_logits_that_are_too_many_are_computed_again() -> None:
    assert KEPT_LOGITS == KEEP_BYTES, "the engine's own limit"
    decoder = read_decoder(published("qwen2.5-1.5b"))
    few, many = (pass_of([(n, 1)]) for n in (800, 900))
    assert "head_again" not in ends_work(decoder, Cut(), few, "backward")
    again = ends_work(decoder, Cut(), many, "backward")["head_again"]
    assert again == ends_work(decoder, Cut(), many, "forward")["head"]
    assert "head_again" not in ends_work(decoder, Cut(t=2), many, "backward")


def test_messages_between_stages() -> None:
    decoder = read_decoder(published("llama-3-8b"))
    one = pass_of([(1000, 4)])
    assert stage_traffic(decoder, Cut(t=2, p=4), one, "forward") == Traffic("p2p", "p", 4, 4000 * 4096 * 2)
    divided = Cut(t=2, p=4, sequence_parallel=True)
    assert stage_traffic(decoder, divided, one, "forward").bytes == 2000 * 4096 * 2
    assert stage_traffic(decoder, divided, decode_pass([(9, 5)]), "decode").bytes == 5 * 4096 * 2


def test_what_collectives_send() -> None:
    sizes = {what: Traffic(what, "t", 4, 100.0, 3).sent for what in  # type: ignore[arg-type]
             ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "p2p")}  # fmt: skip
    assert sizes == {
        "all_reduce": 450,
        "reduce_scatter": 225,
        "all_gather": 225,
        "all_to_all": 225,
        "p2p": 300,
    }


def test_ends_of_ranks() -> None:
    decoder = read_decoder(published("qwen2.5-1.5b"))
    table = 151936 * 1536
    assert ends_elements(decoder, Cut()) == {"embedding": table, "final_norm": 1536, "head": 0}
    assert ends_elements(decoder, Cut(t=2, p=2)) == {
        "embedding": table // 2, "final_norm": 1536, "head": table // 2
    }  # fmt: skip


def test_numbers_come_fast() -> None:
    """About 100,000 a second on a quiet core; a tenth of that on one that is shared."""
    decoder = read_decoder(published("gemma-2-9b"))
    passes = [pass_of([(length, 4)], decoder.windows) for length in range(1, 101)]
    layer_work(decoder, 0, Cut(t=2), passes[0], "forward")  # compiles
    start = time.process_time()
    for _ in range(50):
        for one in passes:
            layer_work(decoder, 0, Cut(t=2), one, "forward")
    assert time.process_time() - start < 0.5
