"""Packed attention against Hugging Face, one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from realflow.errors import InputError
from realflow.models import attention
from realflow.models.causal import load_model
from realflow.models.precision import full_precision

LENGTHS = [5, 17, 1, 30, 17, 300, 270, 2]  # beyond SHORT, and beyond the tiny window of 8


def packed(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 100, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_and_gradients_equal_each_sequence_alone(tmp_path: Path, family: str) -> None:
    path = tiny_model(tmp_path, family, "float64")
    model = load_model(path, dtype="float64")
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    tokens, positions, cu = packed(LENGTHS)
    ours = model.head(model.run(model.prepare(tokens, positions, cu)))
    with full_precision(torch.float64):
        theirs = torch.cat([plain(piece[None]).logits[0] for piece in tokens.split(LENGTHS)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    pull = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (ours * pull).sum().backward()
    (theirs * pull).sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.module.named_parameters():
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert error <= 1e-10, (name, error)


def test_control_wrong_boundaries_change_the_logits(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path, dtype="float64"), dtype="float64")
    tokens, positions, cu = packed([6, 7])
    moved = cu + torch.tensor([0, 1, 0], dtype=torch.int32)
    good, bad = (model.run(model.prepare(tokens, positions, ends)) for ends in (cu, moved))
    assert (good - bad).abs().max() > 1e-3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=12), st.integers(0, 5))
def test_any_lengths_equal_a_full_mask(lengths: list[int], window: int) -> None:
    """Both ways to compute, padding, reordering and windows against one masked softmax."""
    lengths = [min(length, 40) if index else length for index, length in enumerate(lengths)]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    q, k, v = (
        torch.randn(1, heads, total, 4, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)
    )
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packing = attention.Packing.of(cu, torch.device("cpu"))
    found, _ = attention.packed_attention(
        torch.nn.Module(), q, k, v, None, packing=packing, sliding_window=window or None
    )
    allowed = torch.block_diag(
        *(attention.visible(length, window or None, q.device).double() for length in lengths)
    )
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 2
    expected = torch.softmax(scores.masked_fill(allowed == 0, -torch.inf), -1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(found[0], expected[0].transpose(0, 1), rtol=0, atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9000), max_size=60))
def test_buckets_hold_each_sequence_once_and_waste_little(lengths: list[int]) -> None:
    groups = attention.bucketize(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert sum(longest**2 - lengths[index] ** 2 for index in group) <= attention.WASTE


def test_what_is_not_computed_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 4)
    packing = attention.Packing.of(torch.tensor([0, 2]), q.device)
    with pytest.raises(InputError, match="softcap"):
        attention.packed_attention(torch.nn.Module(), q, q, q, None, packing=packing, softcap=30.0)
    with pytest.raises(InputError, match="attention_mask"):
        attention.packed_attention(torch.nn.Module(), q, q, q, torch.ones(1, 1, 2, 2), packing=packing)
