"""The planner's formulas against their expressions, draws and numbers by hand."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch
from formula_parts import FAMILIES, PRODUCTS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import SMALL, published

from planner.decoder import Decoder, Layer, read_decoder
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
    ends_work,
    expert_elements,
    gradient_traffic,
    layer_elements,
    layer_parts,
    layer_traffic,
    layer_work,
    pairs,
    pass_of,
    stage_elements,
    stage_traffic,
    used_kv_heads,
)
from realflow.models.attention import visible
from realflow.models.logprobs import KEEP_BYTES


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
