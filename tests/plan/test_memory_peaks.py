"""What formulas say of memory, against the peaks of tensors that were alive while the engines computed."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from planner.callbytes import training_bytes
from planner.loads import PREFILL, SHORT, WASTE, Load, _packed
from planner.passing import BLOCK_ELEMENTS, KEEP_BYTES, PRODUCT_ROWS, passing_bytes
from planner.sizes import part_of
from realflow.algorithms.terms import LossTerms
from realflow.data.batch import Batch, pack
from realflow.engines.infer import infer
from realflow.engines.train import TrainEngine
from realflow.graph import find_graph, load_graph
from realflow.graph.types import LoraSpec, OptimizerSpec
from realflow.layout import Layout
from realflow.models.card import build
from realflow.models.causal import load_model
from realflow.models.lora import AdapterSource
from realflow.models.partition import partition, with_head
from realflow.planfile import CallPlan
from realflow.planfile.holdings import Holding
from realflow.runtime.tracking import Tracker

GRPO = load_graph(find_graph("grpo"))
PROMPT = 8
SIZES: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab": 2000,
}


def likelihood(logprobs, entropy) -> LossTerms:
    return LossTerms(0.01 * entropy - logprobs, {})


def distance(values) -> LossTerms:
    return LossTerms((values - 1) ** 2, {})


def batch(lengths: Sequence[int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(4, 100, (length,), generator=generator) for length in lengths]
    values = {"tokens": tokens, "loss_mask": [torch.arange(length) >= PROMPT for length in lengths]}
    extents = {"tokens": "token", "loss_mask": "token"}
    return pack(range(len(lengths)), lengths, values, extents, {"tokens": "int", "loss_mask": "bool"})


@dataclass(frozen=True)
class Found:
    """Bytes counted and estimated: what an idle engine holds, and what inference and training add to that."""

    idle: tuple[int, int]
    inferring: tuple[int, int]
    training: tuple[int, int]

    @property
    def ratios(self) -> tuple[float, float, float]:
        return tuple(estimate / peak for peak, estimate in (self.idle, self.inferring, self.training))  # type: ignore[return-value]


def measured(
    folder: Path, family: str, dtype: str, lengths: Sequence[int], head: str = "lm", recompute: bool = False,
    lora: LoraSpec | None = None, **changes: Any,
) -> Found:  # fmt: skip
    """Two micro-batches of these lengths through one rank's inference and training."""
    sizes = {**SIZES, **changes}
    if family == "gemma3":
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    path = tiny_model(folder / "model", family, dtype=dtype, **sizes)
    loss = likelihood if head == "lm" else distance
    adapters = AdapterSource(lora) if lora else None
    with Tracker() as tracker:
        model = replace(load_model(path, dtype=dtype, head=head, adapters=adapters), recompute=recompute)
        batches = [batch(lengths, seed) for seed in range(2)]
        gc.collect()
        before = tracker.live_bytes
        with tracker.peak() as inferring:
            infer(model, batches, "logprobs" if head == "lm" else "values")
        engine = TrainEngine(model, OptimizerSpec())
        gc.collect()
        idle = tracker.live_bytes
        with tracker.peak() as training:
            engine.step(batches, loss, reads={}, options={})
        engine.close()
    part = part_of(partition(with_head(build(path), head), Layout()), Holding(), dtype, head, lora)
    load = load_of(lengths)
    how = CallPlan((0,), Layout(), "train", recompute=recompute)
    infers, trains = (passing_bytes(GRPO.call(name), how, part, load) for name in ("ref", "train"))
    states = part.weight_bytes + sum(training_bytes(part, 1).values())
    return Found(
        (idle, states),
        (inferring.bytes, sum(infers.values()) + before),
        (training.bytes, sum(trains.values()) + idle),
    )


def load_of(lengths: Sequence[int]) -> Load:
    ids = list(range(len(lengths)))
    groups = [(PROMPT, [length - PROMPT]) for length in lengths]
    load = _packed(groups, ids, list(lengths), ids, sum(lengths), None)
    return replace(load, micro_batches=2, total=2 * load.tokens)


CASES: Mapping[str, tuple[Any, ...]] = {
    "llama": ("llama", "bfloat16", [300] * 4),
    "llama in float32": ("llama", "float32", [300] * 4),
    "llama in float64": ("llama", "float64", [100] * 6),
    "qwen2": ("qwen2", "bfloat16", [300] * 4),
    "qwen3": ("qwen3", "bfloat16", [300] * 4),
    "qwen3 in float32": ("qwen3", "float32", [100] * 6),
    "mistral, sliding": ("mistral", "bfloat16", [300] * 4),
    "gemma3": ("gemma3", "bfloat16", [300] * 4),
    "starcoder2, layer norms": ("starcoder2", "bfloat16", [300] * 4),
    "granite": ("granite", "bfloat16", [300] * 4),
    "scores in memory": ("llama", "bfloat16", [220] * 6),
    "padded": ("llama", "bfloat16", [100, 90, 80, 30, 20]),
    "long and short": ("llama", "bfloat16", [600, 500, 270, 30, 20]),
    "recompute": ("llama", "bfloat16", [300] * 4, "lm", True),
    "recompute, scores": ("llama", "bfloat16", [100] * 8, "lm", True),
    "value head": ("llama", "bfloat16", [300] * 4, "value"),
    "value head, recompute": ("llama", "float32", [100] * 8, "value", True),
}

ADAPTED: Mapping[str, tuple[Any, ...]] = {
    "adapters": ("llama", "bfloat16", [300] * 4, "lm", False, LoraSpec(16, 16)),
    "adapters, recompute": ("llama", "bfloat16", [300] * 4, "lm", True, LoraSpec(16, 16)),
    "adapters, scores": ("qwen2", "float32", [100] * 8, "lm", False, LoraSpec(4, 8, ("q_proj", "v_proj"))),
}


@pytest.mark.parametrize("case", ADAPTED)
def test_estimates_with_adapters_are_above_counted_peaks(tmp_path: Path, case: str) -> None:
    """What frozen weights spare is not taken off, but for gradients and optimizer states."""
    found = measured(tmp_path, *ADAPTED[case])
    idle, inferring, training = found.ratios
    assert 0.99 <= idle <= 1.01
    assert 0.97 <= inferring <= 1.3
    assert 0.97 <= training <= 1.3


@pytest.mark.parametrize("case", CASES)
def test_estimates_are_within_a_tenth_of_counted_peaks(tmp_path: Path, case: str) -> None:
    found = measured(tmp_path, *CASES[case])
    idle, inferring, training = found.ratios
    assert 0.99 <= idle <= 1.01, "tables of positions and counters are not counted"
    assert 0.97 <= inferring <= 1.1
    assert 0.97 <= training <= 1.1


def test_a_vocabulary_whose_logits_are_computed_again(tmp_path: Path) -> None:
    """More logits than are kept: the gradient of the head is what is there instead."""
    found = measured(tmp_path, "llama", "bfloat16", [300] * 10, vocab=50_000, hidden_size=64, head_dim=32)
    assert 0.97 <= found.ratios[2] <= 1.1


def test_a_formula_without_scores_would_be_found_out(tmp_path: Path) -> None:
    """A control: what short sequences keep for attention is more than the tolerance."""
    case: Any = CASES["scores in memory"]
    peak, estimate = measured(tmp_path, *case).training
    part = part_of(partition(build(tmp_path / "model"), Layout()), Holding(), "bfloat16", "lm")
    how = CallPlan((0,), Layout(), "train")
    loads = (load_of(case[2]), replace(load_of(case[2]), pairs=0))
    whole, less = (sum(passing_bytes(GRPO.call("train"), how, part, load).values()) for load in loads)
    assert estimate - whole + less < 0.9 * peak


def test_numbers_said_again_are_the_engines() -> None:
    import inspect

    from realflow.engines.generate import NativeEngine
    from realflow.models import attention, logprobs

    assert inspect.signature(NativeEngine).parameters["prefill_tokens"].default == PREFILL
    assert (attention.SHORT, attention.WASTE) == (SHORT, WASTE)
    theirs = (logprobs.KEEP_BYTES, logprobs.PRODUCT_ROWS, logprobs.BLOCK_ELEMENTS)
    assert theirs == (KEEP_BYTES, PRODUCT_ROWS, BLOCK_ELEMENTS)


def test_padding_is_that_of_the_packed_batches() -> None:
    from realflow.models.attention import SHORT, bucketize

    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 500, (30,), generator=generator).tolist()
        lengths = [PROMPT + length for length in lengths]
        load = load_of(lengths)
        groups = [(len(group), max(lengths[i] for i in group)) for group in bucketize(lengths)]
        assert load.padded == sum(count * longest for count, longest in groups)
        assert load.short == sum(count * longest for count, longest in groups if longest <= SHORT)
        assert load.pairs == sum(count * longest**2 for count, longest in groups if longest <= SHORT)


# ---------------------------------------------------------------- the tracker


def test_a_tracker_counts_storages_and_not_views() -> None:
    with Tracker() as tracker:
        start = tracker.live_bytes
        one = torch.zeros(1000)
        views = [one[:10], one.view(10, 100), one.detach()]
        assert tracker.live_bytes - start == 4000
        with tracker.peak() as peak:
            other = one + 1
            del other
            assert tracker.live_bytes - start == 4000
        assert peak.bytes - start == 8000
        one.untyped_storage().resize_(0)
        assert tracker.live_bytes == start, "let go, as an offloaded model's"
        one.untyped_storage().resize_(4000)
        one.zero_()
        assert tracker.live_bytes - start == 4000
        del one, views
        assert tracker.live_bytes == start


def test_a_tracker_sees_what_backward_keeps_and_what_came_from_elsewhere() -> None:
    given = torch.ones(100, 100, requires_grad=True)  # before the tracker
    with Tracker() as tracker, tracker.peak() as peak:
        result = (given @ given).relu().sum()
        kept = tracker.live_bytes
        result.backward()
    assert kept >= 2 * 40_000, "the input, and the product or its relu"
    assert peak.bytes >= 3 * 40_000, "and gradients"
    assert given.grad is not None
