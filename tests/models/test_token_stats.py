"""Chunked log probabilities and entropies against log_softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.models import logprobs
from realflow.models.logprobs import token_stats


def problem(rows: int, vocabulary: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = 2 * torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden.requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(hidden, weight, targets, temperature):
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@settings(deadline=None)
@given(st.integers(0, 70), st.integers(1, 40), st.floats(0.3, 3), st.booleans(), st.booleans())
def test_values_and_gradients(rows: int, vocabulary: int, temperature: float, keep: bool, pull: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:  # many small blocks
        patch.setattr(logprobs, "PRODUCT_ROWS", 16)
        patch.setattr(logprobs, "BLOCK_ELEMENTS", 64)
        hidden, weight, targets = problem(rows, vocabulary, torch.float64, seed=rows)
        limit = 2**30 if keep else 0
        found = token_stats(hidden, weight, targets, temperature=temperature, keep_bytes=limit)
        expected = plain(hidden, weight, targets, temperature)
        torch.testing.assert_close(tuple(found), expected, rtol=0, atol=1e-11)
        factors = torch.linspace(-1, 2, rows, dtype=torch.float64)
        results = []
        for log_p, entropy in (found, expected):
            total = (factors * log_p).sum() + (0.7 * entropy.square().sum() if pull else 0)
            results.append(torch.autograd.grad(total, (hidden, weight)))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_gradcheck(keep_bytes: int) -> None:
    hidden, weight, targets = problem(5, 11, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: tuple(token_stats(h, w, targets, temperature=0.7, keep_bytes=keep_bytes)),
        (hidden, weight),
    )


def test_keeping_logits_changes_no_bit_of_the_values_and_little_of_the_gradient() -> None:
    hidden, weight, targets = problem(300, 50, torch.float32)
    results = []
    for limit in (0, 2**30):
        stats = token_stats(hidden, weight, targets, keep_bytes=limit)
        results.append((stats.logprobs.detach(), torch.autograd.grad(stats.logprobs.sum(), hidden)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-6)


def test_bfloat16_rows_give_float32_values_near_those_of_their_logits() -> None:
    hidden, weight, targets = problem(64, 50, torch.bfloat16)
    stats = token_stats(hidden, weight, targets)
    logits = (hidden @ weight.t()).float()
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    assert stats.logprobs.dtype == stats.entropy.dtype == torch.float32
    torch.testing.assert_close(stats.logprobs, expected, rtol=0, atol=1e-5)
    stats.logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_control_another_temperature_differs() -> None:
    hidden, weight, targets = problem(20, 30, torch.float64)
    found = token_stats(hidden, weight, targets, temperature=1.01).logprobs
    assert (found - plain(hidden, weight, targets, 1.0)[0]).abs().max() > 1e-3
