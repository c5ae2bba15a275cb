"""Seconds from data sheets and from measurements."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.decoder import Decoder, read_decoder
from planner.formulas import Cut, Pass, decode_pass, layer_work, pass_of
from planner.hardware import device
from planner.profile import Point, Profile, Table
from planner.rates import CONSTANTS, Rates, Seconds, make_rates, worse
from realflow.errors import InputError
from realflow.planfile import Node

SMALL = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LARGE = {
    **SMALL,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
small, large = read_decoder(SMALL, "lm"), read_decoder(LARGE, "lm")
H100 = Node("n", 8, "h100")
BF16 = "bfloat16"


def tables() -> tuple[Table, ...]:
    """As a machine of two cores would give them: seconds that tell where they come from."""
    found = []
    for (threads, busy, t), doing in product(
        [(2, 1, 1), (1, 1, 1), (1, 2, 1), (1, 2, 2)], ["infer", "forward", "backward"]
    ):
        key = {"model": "small", "threads": threads, "busy": busy, "t": t, "doing": doing}
        each = 1e-4 * (3 - threads) * (1 + 0.1 * busy) / t * (2 if doing == "backward" else 1)
        grid = [(32, 32), (512, 32), (2048, 32), (512, 512), (2048, 512)]
        points = tuple(Point((x, y), each * x * (1 + y / 1000), 0.02) for x, y in grid)
        found.append(Table("layer", key, ("tokens", "length"), points))
        rows = tuple(Point((x,), each * 8 * x) for x in (16, 1024))
        found += [Table(what, key, ("rows",), rows) for what in ("ends", "head", "embedding", "values")]
    for threads, busy, t in [(2, 1, 1), (1, 1, 1), (1, 2, 1), (1, 2, 2)]:
        key = {"model": "small", "threads": threads, "busy": busy, "t": t}
        grid = list(product((1, 16, 64), (64, 512)))
        points = tuple(Point((x, y), 1e-4 * (10 + x + y / 100) / threads) for x, y in grid)
        found.append(Table("decode", key, ("slots", "context"), points))
        found.append(Table("engine", key, ("slots",), (Point((1,), 0.01), Point((64,), 0.02))))
        found.append(Table("engine_middle", key, ("slots",), (Point((1,), 0.001), Point((64,), 0.002))))
    for data, busy in [(1, 1), (1, 2), (2, 2)]:
        key = {"dtype": BF16, "data": data, "threads": 1, "busy": busy, "t": 1}
        found.append(Table("update", key, ("elements",), (Point((1e6,), 0.01), Point((1e8,), 1.0))))
    found.append(Table("reduce_scatter", {"ranks": 2}, ("bytes",), (Point((1e6,), 1e-3), Point((1e8,), 0.1))))
    found.append(
        Table(
            "all_reduce", {"ranks": 2, "dtype": BF16}, ("bytes",), (Point((4096,), 1e-4), Point((1e7,), 1e-2))
        )
    )
    found += [
        Table(what, {}, ("bytes",), (Point((4096,), 1e-4), Point((1e8,), 0.1)))
        for what in ("p2p", "realloc", "copy", "host_copy")
    ]
    return tuple(found)


def profile() -> Profile:
    models = {"small": {"config": SMALL, "dtype": BF16}}
    return Profile({"cores": 2, "kind": "cpu"}, {}, "", models, tables(), {"dispatch": 0.0042}, "0" * 16)


def rates(ranks: int = 2) -> Rates:
    return make_rates(Node("local", ranks, "cpu"), profile())


def test_sums_keep_the_least_certain_source() -> None:
    total = Seconds(1.0) + Seconds(2.0, "catalogue") * 2 + Seconds(1.0, "extrapolated")
    assert (total.value, total.source) == (6.0, "catalogue")
    assert worse("measured", "extrapolated") == "extrapolated"


# ---- measured ---------------------------------------------------------------------------------------


def test_inside_what_was_measured() -> None:
    found = rates().layer(small, 0, Cut(), pass_of([(512, 4)]), "infer", dtype=BF16, busy=2)
    assert found.source == "measured"
    assert found.value == pytest.approx(2e-4 * 1.2 * 2048 * 1.512)
    between = rates().layer(small, 0, Cut(), pass_of([(100, 10)]), "backward", dtype=BF16)
    assert between.source == "measured" and 4e-4 * 1.1 * 512 < between.value < 4e-4 * 1.1 * 2048 * 1.6


def with_attention() -> Rates:
    """Attention that takes 2 us for each token; 3 us where samples share tokens."""
    found = list(tables())
    for what, each in (("attention", 2e-6), ("spread", 3e-6)):
        for (threads, busy, t), doing in product([(2, 1, 1), (1, 1, 1), (1, 2, 1)], ["infer", "forward"]):
            key = {"model": "small", "threads": threads, "busy": busy, "t": t, "doing": doing}
            points = tuple(Point((x, y), each * x) for x, y in product((512, 4096), (32, 512)))
            found.append(Table(what, key, ("tokens", "length"), points))
    made = Profile({"cores": 2, "kind": "cpu"}, {}, "", profile().models, tuple(found), {}, "0" * 16)
    return make_rates(Node("local", 2, "cpu"), made)


def test_tokens_that_samples_share_are_attended_to_by_all() -> None:
    plain = pass_of([(100, 20)])
    shared = replace(plain, tokens=800.0, context=1200.0)
    known = with_attention()
    alone = replace(plain, tokens=800.0, pairs=plain.pairs * 0.4)
    base = known.layer(small, 0, Cut(), alone, "infer", dtype=BF16)
    found = known.layer(small, 0, Cut(), shared, "infer", dtype=BF16)
    assert found.source == "measured"
    assert found.value == pytest.approx(base.value + 3e-6 * 2000 - 2e-6 * 800)
    assert known.layer(small, 0, Cut(), plain, "infer", dtype=BF16).value > found.value
    longer = replace(plain, tokens=2000.0, context=6000.0, pairs=plain.pairs * 4)
    assert known.layer(small, 0, Cut(), longer, "infer", dtype=BF16).source == "extrapolated"
    other = known.layer(large, 0, Cut(), shared, "infer", dtype=BF16)
    assert other.source == "extrapolated" and other.value > found.value
    # Without such tables all pairs are taken to be those of fewer, longer samples.
    older = rates().layer(small, 0, Cut(), shared, "infer", dtype=BF16)
    assert older == rates().layer(small, 0, Cut(), replace(shared, context=0), "infer", dtype=BF16)


def test_threads_follow_the_ranks_of_the_node() -> None:
    one = pass_of([(512, 4)])
    alone = rates(1).layer(small, 0, Cut(), one, "infer", dtype=BF16)
    shared = rates(2).layer(small, 0, Cut(), one, "infer", dtype=BF16)
    assert alone.source == shared.source == "measured"
    assert shared.value == pytest.approx(2 * alone.value)


def test_more_ranks_than_cores_share_them() -> None:
    one = pass_of([(512, 4)])
    two = rates(2).layer(small, 0, Cut(), one, "infer", dtype=BF16, busy=2)
    four = rates(4).layer(small, 0, Cut(), one, "infer", dtype=BF16, busy=4)
    assert four.source == "extrapolated" and four.value == pytest.approx(2 * two.value)


def test_beyond_what_was_measured_the_roofline_scales() -> None:
    known = rates().layer(small, 0, Cut(), pass_of([(512, 4)]), "infer", dtype=BF16)
    beyond = rates().layer(small, 0, Cut(), pass_of([(512, 16)]), "infer", dtype=BF16)
    assert beyond.source == "extrapolated" and 3.5 < beyond.value / known.value < 4.5
    longer = rates().layer(small, 0, Cut(), pass_of([(2048, 1)]), "infer", dtype=BF16)
    assert longer.source == "extrapolated" and longer.value > known.value


def test_another_shape_is_extrapolated_by_its_work() -> None:
    one = pass_of([(512, 4)])
    known = rates().layer(small, 0, Cut(), one, "infer", dtype=BF16)
    other = rates().layer(large, 0, Cut(), one, "infer", dtype=BF16)
    ratio = (
        layer_work(large, 0, Cut(), one, "forward").flops / layer_work(small, 0, Cut(), one, "forward").flops
    )
    assert other.source == "extrapolated" and other.value / known.value == pytest.approx(ratio, rel=0.25)


def test_another_dtype_was_not_measured() -> None:
    found = rates().layer(small, 0, Cut(), pass_of([(512, 4)]), "infer", dtype="float32")
    assert found.source == "catalogue"


def test_cut_layers_were_measured_with_their_collectives() -> None:
    one = pass_of([(512, 4)])
    cut = rates().layer(small, 0, Cut(t=2), one, "infer", dtype=BF16, busy=2)
    assert cut.source == "measured"
    assert rates().layer(small, 0, Cut(t=2, p=2), one, "infer", dtype=BF16, busy=2) == cut
    assert rates().layer(small, 0, Cut(t=3), one, "infer", dtype=BF16, busy=2).source == "extrapolated"
    sequence = rates().layer(small, 0, Cut(t=2, sequence_parallel=True), one, "infer", dtype=BF16, busy=2)
    assert sequence.source == "extrapolated"


def test_ends_by_stage() -> None:
    one = replace(pass_of([(64, 8)]), rows=100.0)
    whole = rates().ends(small, Cut(), one, "forward", dtype=BF16)
    assert whole.source == "measured" and whole.value == pytest.approx(1.1 * 2e-4 * 8 * 100)
    assert rates().ends(small, Cut(), one, "forward", dtype=BF16, first=False, last=False).value == 0
    assert rates().ends(small, Cut(), one, "forward", dtype=BF16, last=False).source == "measured"
    critic = read_decoder(SMALL, "value")
    assert rates().ends(critic, Cut(), one, "backward", dtype=BF16).source == "measured"
    prefill = rates().ends(small, Cut(), one, "prefill", dtype=BF16)
    assert prefill == rates().ends(small, Cut(), one, "infer", dtype=BF16, last=False)


def test_decoding() -> None:
    found = rates().decode_layer(small, 0, Cut(), decode_pass([(100, 8)]), dtype=BF16)
    assert found.source == "measured" and found.value == pytest.approx(1e-4 * (10 + 8 + 1))
    ends = rates().decode_ends(small, Cut(), 64, dtype=BF16)
    assert (ends.value, ends.source) == (0.02, "measured")
    assert rates().decode_ends(small, Cut(), 64, dtype=BF16, last=False).value == 0.002
    assert rates().decode_ends(small, Cut(), 500, dtype=BF16).source == "extrapolated"


def test_updates_messages_and_constants() -> None:
    known = rates()
    assert known.update(1e6, dtype=BF16).value == 0.01
    assert known.update(1e6, 2, dtype=BF16, busy=2).source == "measured"
    assert known.update(1e6, 4, dtype=BF16, busy=2).source == "extrapolated"
    assert known.reduce_gradients(0.25e6, 2, dtype=BF16) == Seconds(1e-3)
    assert known.collective("all_reduce", 4096, 2) == Seconds(1e-4)
    assert known.collective("all_reduce", 1e9, 2).source == "extrapolated"
    assert known.collective("all_reduce", 4096, 4).source == "extrapolated"
    assert known.collective("all_to_all", 4096, 2).source == "catalogue"
    assert known.collective("all_reduce", 4096, 1) == known.collective("all_reduce", 0, 2) == Seconds(0.0)
    assert known.p2p(4096) == Seconds(1e-4) and known.p2p(4096, between=True).source == "catalogue"
    for method in (known.realloc, known.copy, known.host_copy):
        assert method(4096) == Seconds(1e-4) and method(0) == Seconds(0.0)
        assert method(1e9).source == "extrapolated" and method(1e9).value > 0.5
    assert known.constant("dispatch") == Seconds(0.0042)
    assert known.constant("sample") == Seconds(CONSTANTS["sample"], "catalogue")


def test_a_profile_of_another_device_is_refused() -> None:
    with pytest.raises(InputError, match="the profile is of cpu"):
        make_rates(H100, profile())


# ---- the catalogue ----------------------------------------------------------------------------------


def test_training_is_bound_by_products_and_decoding_by_bytes() -> None:
    known, h100 = make_rates(H100), device("h100")
    one = pass_of([(2048, 8)])
    work = layer_work(large, 0, Cut(), one, "forward")
    seconds = known.layer(large, 0, Cut(), one, "forward", dtype=BF16)
    assert seconds.source == "catalogue"
    assert 0.4 < work.flops / seconds.value / h100.flops[BF16] < h100.achieved_flops
    step = decode_pass([(1024, 8)])
    decode = layer_work(large, 0, Cut(), step, "decode")
    seconds = known.decode_layer(large, 0, Cut(), step, dtype=BF16)
    assert 0.3 < decode.bytes / seconds.value / h100.bandwidth < h100.achieved_bandwidth
    assert decode.flops / seconds.value / h100.flops[BF16] < 0.05


def test_small_work_is_less_efficient() -> None:
    known = make_rates(H100)

    def efficiency(tokens: int) -> float:
        one = pass_of([(tokens, 1)])
        work = layer_work(large, 0, Cut(), one, "forward")
        return work.flops / known.layer(large, 0, Cut(), one, "forward", dtype=BF16).value

    found = [efficiency(tokens) for tokens in (16, 64, 256, 1024, 4096)]
    assert found == sorted(found) and found[0] < found[-1] / 8


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 8192),
    st.integers(1, 64),
    st.sampled_from(["infer", "forward", "backward", "recompute", "prefill"]),
    st.sampled_from([1, 2, 4, 8]),
)
def test_more_work_never_takes_less(length: int, count: int, doing, t: int) -> None:
    known = make_rates(H100)
    one, more = pass_of([(length, count)]), pass_of([(length, count + 1)])
    first = known.layer(large, 0, Cut(t=t), one, doing, dtype=BF16).value
    assert 0 < first <= known.layer(large, 0, Cut(t=t), more, doing, dtype=BF16).value


def test_collectives_inside_and_between_nodes() -> None:
    known, h100 = make_rates(H100), device("h100")
    size = 1e9
    inside = known.collective("all_reduce", size, 8, 8).value
    assert inside == pytest.approx(2 * size * 7 / 8 / h100.inside.bytes_per_second, rel=0.01)
    apart = known.collective("all_reduce", size, 8, 1).value
    assert apart == pytest.approx(2 * size * 7 / 8 / h100.between.bytes_per_second, rel=0.01)
    assert inside < known.collective("all_reduce", size, 16, 8).value < apart
    half = known.collective("reduce_scatter", size, 8, 8).value
    assert half == known.collective("all_gather", size, 8, 8).value == pytest.approx(inside / 2)
    assert known.collective("all_to_all", size, 8, 8).value < known.collective("all_to_all", size, 8, 1).value
    assert known.p2p(size).value < known.p2p(size, between=True).value
    assert known.collective("all_reduce", 8.0, 8, 8).value > 10e-6  # latency


def test_tensor_parallel_layers_carry_their_messages() -> None:
    known = make_rates(H100)
    one = pass_of([(2048, 8)])
    whole = known.layer(large, 0, Cut(), one, "forward", dtype=BF16).value
    cut = known.layer(large, 0, Cut(t=8), one, "forward", dtype=BF16).value
    assert whole / 8 < cut < whole
    slow = Rates(replace(device("h100"), inside=device("l40s").inside), 8)
    assert slow.layer(large, 0, Cut(t=8), one, "forward", dtype=BF16).value > 2 * cut


def test_recompute_takes_a_forward_more() -> None:
    known = make_rates(H100)
    one = pass_of([(2048, 8)])
    forward, backward, again = (
        known.layer(large, 0, Cut(), one, doing, dtype=BF16).value
        for doing in ("forward", "backward", "recompute")
    )
    assert backward < again < 1.15 * (forward + backward)


def test_updates_are_bound_by_memory() -> None:
    known, h100 = make_rates(H100), device("h100")
    seconds = known.update(1e9, dtype=BF16).value
    assert 30e9 / h100.bandwidth < seconds < 80e9 / h100.bandwidth
    assert known.update(1e9, 8, dtype=BF16).value < seconds


def test_fast_enough_for_a_search() -> None:
    import time

    known = make_rates(H100)
    began = time.perf_counter()
    for tokens in range(1, 3000):
        known.layer(large, 0, Cut(t=8), Pass(tokens, 64 * tokens), "forward", dtype=BF16)
    assert time.perf_counter() - began < 3


def test_every_shape_of_config_has_rates() -> None:
    window = {**SMALL, "model_type": "mistral", "sliding_window": 128}
    decoder: Decoder = read_decoder(window, "lm")
    one = pass_of([(512, 4)], decoder.windows)
    for doing in ("infer", "prefill", "forward", "backward", "recompute"):
        assert make_rates(H100).layer(decoder, 0, Cut(), one, doing, dtype=BF16).value > 0
        assert rates().layer(decoder, 0, Cut(), one, doing, dtype=BF16).source in (
            "extrapolated",
            "catalogue",
        )
