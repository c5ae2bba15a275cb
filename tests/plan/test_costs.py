"""What costs count is what engines and master do: samples, micro-batches, rounds, pipelines, minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from flat_rates import CONSTANT, FlatRates
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cards import llama_card

from planner.costs import Costs
from planner.costs.batches import Sample, _pack, dispatch, mean_pack, sequence_cost
from planner.costs.functions import SAMPLE_SECONDS
from planner.costs.passes import BUCKET
from planner.costs.rollout import PREFILL, as_few, expected_maximum, simulate, slowest_replica
from planner.costs.stages import pipelined, stage_classes, stage_runs
from planner.decoder import Decoder, read_decoder
from planner.lengths import Lengths, Pair, read_lengths
from realflow.data.balance import micro_batches, minibatches
from realflow.engines import shards
from realflow.engines.generate import NativeEngine
from realflow.engines.pipeline import orders
from realflow.engines.pipeline import simulate as simulate_stages
from realflow.engines.samples import Prompt
from realflow.engines.samples import Sample as Running
from realflow.engines.slots import Slots
from realflow.graph import load_graph
from realflow.graph.types import Graph
from realflow.layout import Layout
from realflow.models.costs import cost_model
from realflow.models.partition import stages
from realflow.models.sharing import find_shared
from realflow.planfile import CallPlan
from realflow.runtime.assign import divide

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
}


def decoder(*, tied: bool = True, head: Any = "lm", **changes: Any) -> Decoder:
    return read_decoder(CONFIG | {"tie_word_embeddings": tied} | changes, head)


def graph(**lengths: Any) -> Graph:
    actor = {"path": "a", "dtype": "float32", "optimizer": {"lr": 1e-5}}
    return load_graph(
        {
            "name": "costs",
            "models": {"actor": actor, "ref": {"path": "a", "dtype": "float32"}},
            "data": {"source": "my.data:rows", "fields": {"prompt": "question", "answer": "answer"},
                     "max_length": 50},
            "calls": {
                "rollout": {"model": "actor", "op": "generate", "batch": "8 prompts", "samples": 4,
                            "max_new_tokens": 40},
                "reward": {"op": "function", "use": "rewards.last_number"},
                "ref": {"model": "ref", "op": "infer", "use": "logprobs",
                        "writes": {"logprobs": "ref_logprobs"}},
                "credit": {"op": "function", "use": "advantages.grpo"},
                "train": {"model": "actor", "op": "train", "use": "losses.ppo_clip", "minibatches": 2},
            },
            "steps": 1,
            **({"lengths": lengths} if lengths else {}),
        }
    )  # fmt: skip


def costs(rates: FlatRates | None = None, *, per_node: int = 8, **lengths: Any) -> Costs:
    made = graph(**lengths)
    models = {name: decoder(head=spec.head) for name, spec in made.models.items()}
    return Costs(made, models, read_lengths(made), rates or FlatRates(), per_node=per_node)


def how(layout: str, **flags: Any) -> CallPlan:
    shape = Layout.parse(layout)
    return CallPlan(tuple(range(shape.size)), shape, "native", **flags)


# ---- samples and micro-batches ----------------------------------------------------------------------


RESPONSES = st.lists(st.integers(1, 40), min_size=4, max_size=4)
SAMPLES = st.lists(st.tuples(st.integers(1, 30), RESPONSES), min_size=2, max_size=12)


@pytest.mark.parametrize("tied", [True, False])
def test_a_sequence_is_weighed_as_the_master_weighs_it(tied: bool) -> None:
    card = llama_card(layers=6, hidden=32, intermediate=48, tied=tied)
    assert sequence_cost(decoder(tied=tied)) == cost_model(card)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(40, 400), st.integers(0, 200), st.booleans())
def test_the_slowest_replica_gets_the_micro_batches_of_the_run(
    replicas: int, count: int, budget: int, seed: int, whole: bool
) -> None:
    """As `Orders.spread` and the workers divide a step, on the same lengths, also where groups stay whole."""
    pairs = tuple(Pair(5 + (seed + i) % 7, 1 + (seed * i * i) % 39, 1 / 9) for i in range(9))
    lengths = Lengths(tuple(sorted(pairs)), 50, 40, "")
    cost = sequence_cost(decoder())
    found = dispatch(
        lengths, 8, 4, replicas=replicas, count=count, budget=budget, cost=cost, whole_groups=whole
    )
    tokens = [p + r for p, responses in lengths.batch(8, 4) for r in responses]
    batches = minibatches(range(32), [i // 4 for i in range(32)], count)
    assert len(found.packs) == count and found.minibatches == found.repeats == 1
    for packs, batch in zip(found.packs, batches, strict=True):
        shares = divide(batch, dict(enumerate(tokens)), replicas, cost, groups_of(batch, whole))
        slowest = max(sum(cost(tokens[i]) for i in share) for share in shares)
        mine = sum(cost(int(length)) * n for pack in packs for length, n in pack.lengths)
        assert mine == pytest.approx(slowest)
        parts = [
            len(micro_batches([tokens[i] for i in share], budget, groups_of(share, whole)))
            for share in shares
        ]
        assert len(packs) in parts
        assert all(pack.tokens <= budget or pack.sequences == (4 if whole else 1) for pack in packs)


def groups_of(samples: Sequence[int], whole: bool) -> list[int] | None:
    return [sample // 4 for sample in samples] if whole else None


@settings(max_examples=40, deadline=None)
@given(SAMPLES, st.integers(0, 5))
def test_tokens_that_samples_share_count_once(rows: list[tuple[int, list[int]]], common: int) -> None:
    """As `realflow.models.sharing` finds them in the tokens themselves."""
    samples, tokens, ends, fresh = [], [], [0], 1000
    for group, (prompt, responses) in enumerate(rows):
        prompt = max(prompt, common)
        for response in responses:
            samples.append(Sample(group, prompt, response))
            own = [10 * group + 500 + i for i in range(prompt - common)]
            tokens += [*range(common), *own, *range(fresh, fresh + response)]
            fresh += response
            ends.append(len(tokens))
    shared = find_shared(torch.tensor(tokens), torch.tensor(ends, dtype=torch.int32))
    distinct = len(tokens) if shared is None else len(shared.keep)
    assert _pack(samples, common).distinct == distinct


def test_large_steps_are_looked_at_in_part() -> None:
    pairs = tuple(Pair(100, 50 * i, 1 / 20) for i in range(1, 21))
    lengths, cost = Lengths(pairs, 100, 1000, ""), sequence_cost(decoder())
    small = dispatch(lengths, 64, 16, replicas=4, count=1, budget=8192, cost=cost)
    large = dispatch(lengths, 4096, 16, replicas=4, count=1, budget=8192, cost=cost)
    ratio = len(large.packs[0]) * large.repeats * large.minibatches / len(small.packs[0])
    assert ratio == pytest.approx(64, rel=0.1)
    spread = dispatch(lengths, 4096, 16, replicas=4096 * 16, count=1, budget=8192, cost=cost)
    assert [pack.tokens for pack in spread.packs[0]] == [1100], "one of so many replicas has the longest"
    mean = mean_pack(small.packs[0])
    assert mean.tokens * len(small.packs[0]) == pytest.approx(sum(p.tokens for p in small.packs[0]))


# ---- rounds of a rollout -----------------------------------------------------------------------------


class NoCache:
    """A KV cache that holds nothing: slots only tell it what to copy."""

    def copy(self, *_: int) -> None:
        pass


def engine_rounds(rows: list[tuple[int, list[int]]], slots: int) -> tuple[int, int, float, int]:
    """Passes, slot-steps, the sum over passes of the longest running sample, and tokens prefilled, as the
    engine's own slots make them."""
    held, queue, ids = Slots(slots), [], 0
    for group, (prompt, responses) in enumerate(rows):
        tokens = tuple(10_000 * (group + 1) + i for i in range(prompt))
        whole = Prompt(group, tuple(range(ids, ids + len(responses))), tokens)
        queue += [Running(whole, index, response) for index, response in enumerate(responses)]
        ids += len(responses)
    held.queue.extend(queue)
    passes = steps = prefilled = 0
    longest = 0.0
    while held.queue or held.running:
        _, prefixes = held.admit(NoCache(), PREFILL)  # type: ignore[arg-type]
        held.close_gaps(NoCache())  # type: ignore[arg-type]
        running = held.running
        prefilled += sum(len(prefix.tokens) for prefix in prefixes)
        passes, steps = passes + 1, steps + len(running)
        longest += max(sample.length for sample in running)
        for slot, sample in enumerate(held.slots):
            if sample is not None:
                sample.response.append(0)
                if len(sample.response) == sample.limit:
                    held.slots[slot] = None
    return passes, steps, longest, prefilled


@settings(max_examples=20, deadline=None)
@given(SAMPLES, st.integers(1, 20))
def test_rounds_are_those_of_the_engines_slots(rows: list[tuple[int, list[int]]], slots: int) -> None:
    history = simulate([(prompt, tuple(responses)) for prompt, responses in rows], slots)
    passes, steps, longest, prefilled = engine_rounds(rows, slots)
    assert sum(r.count for r in history.rounds) == pytest.approx(passes)
    assert sum(r.count * r.running for r in history.rounds) == pytest.approx(steps)
    assert sum(r.count * r.longest for r in history.rounds) == pytest.approx(longest, rel=0.02, abs=1)
    assert history.samples == 4 * len(rows)
    mine = history.prefill.tokens * history.prefill.passes
    assert mine == pytest.approx(sum(max(0, prompt - 1) for prompt, _ in rows))
    # A prompt whose last copy left the cache is prefilled again; short ones are not worth copying.
    assert mine <= prefilled + 8 * len(rows) * 4


def test_what_is_said_again_is_what_the_engine_has() -> None:
    assert NativeEngine.__init__.__kwdefaults__["prefill_tokens"] == PREFILL
    assert shards.BUCKET == BUCKET


def test_the_last_replica_has_the_longest_response() -> None:
    pairs = tuple(Pair(10, r, 1 / 40) for r in range(1, 41))
    lengths = Lengths(pairs, 50, 40, "")
    for replicas in (1, 2, 4, 8):
        groups = slowest_replica(lengths, 8, 4, replicas, slots=64)
        assert len(groups) == 8 // replicas
        assert max(max(responses) for _, responses in groups) >= 39
    assert expected_maximum(1) == 0 < expected_maximum(2) < expected_maximum(100) < 3


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 50), st.integers(1, 60))
def test_fewer_replicas_stand_for_as_many_as_draw_the_same(
    prompts: int, samples: int, replicas: int, slots: int
) -> None:
    lengths = Lengths(tuple(Pair(10, r, 1 / 40) for r in range(1, 41)), 50, 40, "")

    def drawn(count: int) -> object:
        return slowest_replica(lengths, prompts, samples, count, slots)

    few = as_few(prompts, samples, replicas, slots)
    assert few <= replicas and drawn(few) == drawn(replicas)
    assert as_few(prompts, samples, few, slots) == few


def test_replicas_that_draw_other_samples_do_not_stand_for_each_other() -> None:
    assert [as_few(10, 4, replicas, 8) for replicas in (1, 2, 3, 4, 5, 6, 9)] == [1, 2, 3, 4, 5, 6, 9]
    assert [as_few(10, 4, replicas, 7) for replicas in (5, 6, 9)] == [5, 5, 5]  # two prompts each
    lengths = Lengths(tuple(Pair(10, r, 1 / 40) for r in range(1, 41)), 50, 40, "")
    assert slowest_replica(lengths, 10, 4, 5, 8) != slowest_replica(lengths, 10, 4, 6, 8)


# ---- stages ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.booleans())
def test_stages_of_a_class_compute_the_same(count: int, window: int, decoding: bool) -> None:
    model = decoder(num_hidden_layers=12, model_type="qwen2", sliding_window=window + 1, max_window_layers=3,
                    use_sliding_window=window > 0)  # fmt: skip
    firsts, of = stage_classes(model, count, decoding=decoding)
    runs = stage_runs(model, count)
    told = [(run.kinds, run.ends, run.embeds and not decoding) for run in runs]
    assert len(of) == count and len(firsts) == len(set(told))
    assert [told[firsts[one]] for one in of] == told
    assert all(of.index(index) == first for index, first in enumerate(firsts))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_stages_are_those_of_the_engine(tied: bool, count: int) -> None:
    card = llama_card(layers=6, hidden=32, intermediate=48, tied=tied)
    runs = [(run.first, run.stop, run.embeds, run.ends) for run in stage_runs(decoder(tied=tied), count)]
    assert runs == [(s.first, s.stop, s.embeds, s.ends) for s in stages(card, count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), st.floats(0.5, 3), st.sampled_from(["1f1b", "zero_bubble"]))
def test_pipelines_take_as_long_as_their_orders(
    count: int, batches: int, ratio: float, schedule: str
) -> None:
    """Against the engine's orders, played against each other: stages alike."""
    weight = 0.5 * ratio if schedule == "zero_bubble" and count > 1 else 0.0
    seconds = {"F": 1.0, "B": ratio - weight, "W": weight}
    every = [orders(schedule, count, stage, batches) for stage in range(count)]
    played = simulate_stages(every, seconds)[-1].time  # type: ignore[arg-type]
    found = pipelined([1.0] * count, [ratio] * count, batches, schedule)
    assert found == pytest.approx(played, rel=1e-9 if schedule == "1f1b" else 0.15)


def test_uneven_stages_wait_for_the_slowest() -> None:
    played = pipelined([1.0, 3.0], [2.0, 6.0], 10, "1f1b")
    assert played == 10 * 9 + 3
    assert pipelined([1.0, 3.0], [0.0, 0.0], 10, "forward") == 10 * 3 + 1


# ---- calls -------------------------------------------------------------------------------------------


def test_parts_add_up_and_name_what_is_uncertain() -> None:
    made = costs(prompt=30, response=20)
    for call in made.graph.calls:
        cost = made.call(call.name, how("d2"))
        assert cost.seconds == pytest.approx(sum(cost.parts.values())) and cost.seconds > 0
        assert cost.uncertain == {} and cost.source == "measured"
        assert all(value >= 0 for value in cost.parts.values())


def test_training_is_what_the_formulas_say() -> None:
    """One replica, one stage: all FLOPs of all micro-batches, nothing else but constants and the update."""
    rates = FlatRates()
    made = costs(rates, prompt=30, response=20)
    cost = made.call("train", how("d1", micro_batch_tokens=400))
    passes = [one for doing, one in rates.asked if doing == "backward"]
    assert {one.head_rows for one in passes} == {160.0}, "8 responses of 20 in each micro-batch"
    # Balanced micro-batches mix groups: a prompt counts once for each run of its samples.
    assert all(2 * 30 + 8 * 20 <= one.tokens < 8 * 50 for one in passes)
    assert cost.parts["micro_batches"] == pytest.approx(4 * CONSTANT)
    assert cost.parts["train_step"] == pytest.approx(2 * CONSTANT)
    assert "bubble" not in cost.parts and "reduce" not in cost.parts
    recomputed = made.call("train", how("d1", micro_batch_tokens=400, recompute=True))
    assert recomputed.parts["compute"] > 1.15 * cost.parts["compute"]


def test_data_ranks_share_work_and_reduce_gradients() -> None:
    made = costs(prompt=2, response=40)
    one, two = (made.call("train", how(layout)) for layout in ("d1", "d2"))
    assert two.parts["compute"] == pytest.approx(one.parts["compute"] / 2, rel=0.05)
    assert two.parts["reduce"] > 0
    assert two.parts["optimizer"] == pytest.approx(one.parts["optimizer"] / 2)


def test_a_gpu_reduces_gradients_while_it_computes_them() -> None:
    cpu, gpu = (
        costs(FlatRates(kind), prompt=30, response=20).call("train", how("d2")).parts["reduce"]
        for kind in ("cpu", "h100")
    )
    assert gpu == pytest.approx(cpu), "one bucket: it is complete when the backward pass ends"
    wide = decoder(hidden_size=512, intermediate_size=4096)
    parts = {}
    for kind in ("cpu", "h100"):
        made = costs(FlatRates(kind), prompt=30, response=20)
        made.decoders = dict.fromkeys(made.decoders, wide)
        parts[kind] = made.call("train", how("d2")).parts
    assert wide.size > 4 * BUCKET
    assert parts["h100"]["reduce"] < 0.5 * parts["cpu"]["reduce"]
    assert parts["h100"]["reduce"] >= parts["cpu"]["reduce"] / -(-wide.size // BUCKET) * 0.99


def test_fields_come_from_the_ranks_that_wrote_them() -> None:
    made = costs(prompt=30, response=20)
    assert "fields" not in made.call("ref", how("d1")).parts, "they are there already"
    # Tokens (8 bytes) and the mask (1) of 16 samples, half of which the other rank has.
    assert made.call("ref", how("d2")).parts["fields"] == pytest.approx(16 * 50 * 9 / 2 / 1e8)


def test_stages_have_a_bubble_that_zero_bubble_shrinks() -> None:
    made = costs(prompt=30, response=20)
    plain = made.call("train", how("p2", micro_batch_tokens=100))
    better = made.call("train", how("p2", micro_batch_tokens=100, schedule="zero_bubble"))
    assert 0 < better.parts["bubble"] < plain.parts["bubble"]
    assert plain.parts["messages"] > 0 and plain.parts["sums"] > 0, "a tied table is summed over the ends"
    assert "bubble" not in made.call("ref", how("d2")).parts


def test_ranks_that_share_a_node_slow_each_other_down() -> None:
    alone, slow = costs(FlatRates()), costs(FlatRates(slower=0.3))
    for call in ("rollout", "ref", "train"):
        same = alone.call(call, how("d1")).seconds, slow.call(call, how("d1")).seconds
        assert same[0] == pytest.approx(same[1])
        assert slow.call(call, how("d2")).seconds > 1.15 * alone.call(call, how("d2")).seconds
    # One micro-batch goes through the stages one after the other: only one rank is busy at a time.
    waiting = [made.call("ref", how("p2", micro_batch_tokens=10_000)) for made in (alone, slow)]
    assert waiting[1].seconds < 1.05 * waiting[0].seconds


def test_slots_bound_what_runs_at_once() -> None:
    made = costs(prompt=30, response=20)
    few, many = (made.call("rollout", how("d1", slots=slots)) for slots in (4, 32))
    assert few.parts["decode"] > 1.5 * many.parts["decode"]


def test_calls_that_see_other_responses_count_those() -> None:
    made = costs(prompt={"mean": 30, "std": 5}, response={"mean": 15, "std": 8})
    short = replace(
        made.graph,
        calls=tuple(
            replace(call, sampling=replace(call.sampling, max_new_tokens=5)) if call.sampling else call
            for call in made.graph.calls
        ),
    )
    less = Costs(short, made.decoders, made.lengths, FlatRates(), per_node=8)
    for call in ("rollout", "ref", "train"):
        assert less.call(call, how("d1")).seconds < made.call(call, how("d1")).seconds


def test_functions_that_stream_have_little_left_to_do() -> None:
    made = costs(prompt=30, response={"mean": 15, "std": 8})
    for call in ("reward", "credit"):  # what built-in functions take is counted with the rollout's samples
        assert made.call(call, how("d1")).seconds == pytest.approx(CONSTANT)
    known = Costs(
        made.graph, made.decoders, made.lengths, FlatRates(), per_node=8, function_seconds={"reward": 2.0}
    )
    tail = known.call("reward", how("d1"))
    assert 2.0 < tail.seconds < 0.5 * 2.0 * 32, "the others were done while samples still came"
    assert not tail.assumptions
    mine = replace(
        made.graph.call("reward"), decl=replace(made.graph.call("reward").decl, name="my.mod:slow")
    )
    own = replace(made.graph, calls=tuple(mine if c.name == "reward" else c for c in made.graph.calls))
    assumed = Costs(own, made.decoders, made.lengths, FlatRates(), per_node=8).call("reward", how("d1"))
    assert assumed.parts["samples"] >= SAMPLE_SECONDS
    assert assumed.assumptions == ("reward: 1 ms for each sample",)


def test_context_and_expert_ranks_are_costed_and_said_not_to_run() -> None:
    made = costs(prompt=30, response=20)
    alone, cut = made.call("train", how("d1")), made.call("train", how("d1"), context=2)
    assert cut.parts["compute"] < alone.parts["compute"]
    assert "cannot run it yet" in cut.assumptions[0] and not alone.assumptions
    assert "letter e" in made.call("train", how("d2"), experts=2).assumptions[0]


def test_offload_moves_what_a_call_alone_needs() -> None:
    made = costs()
    assert made.offload("train", how("d2")).value == 0
    size = decoder().size * 4
    states = 2 * size / 2
    away = made.offload("train", how("d2", after="offload"))
    assert away.value == pytest.approx(2 * (size + states) / 1e9)
    # What never changes is on the host already.
    assert made.offload("ref", how("d2", after="offload")).value == pytest.approx(size / 1e9)


def test_moves_cost_what_their_bytes_take() -> None:
    made = costs()
    move = made.move("actor", "actor", Layout(1), Layout(1))
    assert move.inside == pytest.approx(CONSTANT)
    assert move.apart == pytest.approx(CONSTANT + decoder().size * 4 / 1e8)
    across = costs(per_node=1).move("actor", "actor", Layout(1), Layout(1))
    assert across.apart > 3 * move.apart
