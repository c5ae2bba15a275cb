"""Drawing tokens: the distribution, its edges, top-k and top-p, greedy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from realflow.data.random import uniform
from realflow.engines.sampling import draw, restrict
from realflow.errors import RunError
from realflow.graph.types import Sampling

SAMPLING = Sampling(max_new_tokens=1)


def logits_of(batch: int, size: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(batch, size, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@settings(deadline=None)
@given(
    size=st.integers(1, 700),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_the_draw_inverts_the_cumulated_probabilities(size, seed, dtype):
    logits = logits_of(4, size, seed, dtype)
    numbers = uniform(seed, torch.arange(4), 0, 0)
    tokens, logprobs = draw(logits, numbers, SAMPLING)
    exact = logits.double().softmax(-1)
    upper = exact.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    lower = upper - exact.gather(-1, tokens[:, None])[:, 0]
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    assert bool((numbers >= lower - slack).all())
    assert bool((numbers < upper + slack).all())
    expected = exact.log().gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=slack, rtol=slack)
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@settings(deadline=None)
@given(size=st.integers(2, 400), seed=st.integers(0, 1000), edge=st.sampled_from([0.0, 1 - 2.0**-53]))
def test_impossible_tokens_are_never_drawn(size, seed, edge):
    logits = logits_of(3, size, seed, torch.float32)
    possible = torch.rand(3, size, generator=torch.Generator().manual_seed(seed)) < 0.3
    possible[:, seed % size] = True
    logits = logits.masked_fill(~possible, -torch.inf)
    tokens, logprobs = draw(logits, torch.full((3,), edge, dtype=torch.float64), SAMPLING)
    assert bool(possible.gather(-1, tokens[:, None]).all())
    assert bool(logprobs.isfinite().all())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_follow_the_distribution(temperature):
    logits = logits_of(1, 20, 3) / 2
    sampling = Sampling(max_new_tokens=1, temperature=temperature)
    count = 20_000
    tokens, _ = draw(logits.expand(count, -1), uniform(5, torch.arange(count), 0, 9), sampling)
    expected = (logits[0] / temperature).softmax(-1) * count
    seen = torch.bincount(tokens, minlength=20).double()
    freedom = len(expected) - 1
    limit = freedom + 4 * (2 * freedom) ** 0.5  # of chi-square: four standard deviations above its mean
    assert ((seen - expected) ** 2 / expected).sum() < limit
    other = (logits[0] / (2 * temperature)).softmax(-1) * count  # the control: another temperature
    assert ((seen - other) ** 2 / other).sum() > 10 * limit


@settings(deadline=None, max_examples=40)
@given(
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.05]),
    size=st.sampled_from([7, 50, 1500]),
    seed=st.integers(0, 1000),
)
def test_restricting_equals_transformers(top_k, top_p, size, seed):
    logits = logits_of(3, size, seed)
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(restrict(logits, top_k, top_p), expected)


def test_logprobs_are_renormalised():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    sampling = Sampling(max_new_tokens=1, temperature=0.5, top_k=2)
    tokens, logprobs = draw(logits, torch.tensor([0.99]).double(), sampling)
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, torch.tensor([6.0, 4.0]).double().log_softmax(-1)[1:])


def test_equal_logits_at_the_edge_are_kept_together():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    kept = torch.tensor([[True, True, True, False]])
    assert torch.equal(restrict(logits, 2, 1.0).isfinite(), kept)
    assert torch.equal(restrict(logits, 0, 0.6).isfinite(), kept)


def test_greedy_takes_the_largest_and_reports_its_plain_logprob():
    logits = logits_of(5, 300, 1)
    tokens, logprobs = draw(
        logits, torch.zeros(5).double(), Sampling(max_new_tokens=1, temperature=0.0, top_k=1)
    )
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


def test_a_row_does_not_depend_on_its_neighbours():
    logits, numbers = logits_of(9, 1000, 2, torch.float32), uniform(3, torch.arange(9), 0, 4)
    sampling = Sampling(max_new_tokens=1, top_k=50, top_p=0.9)
    together = draw(logits, numbers, sampling)
    for row in range(9):
        alone = draw(logits[row : row + 1], numbers[row : row + 1], sampling)
        assert torch.equal(together[0][row], alone[0][0])
        assert torch.equal(together[1][row], alone[1][0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_logits_are_an_error(bad):
    logits = logits_of(2, 10, 1)
    logits[1, 3] = bad
    with pytest.raises(RunError, match="not finite"):
        draw(logits, torch.tensor([0.1, 0.2]).double(), SAMPLING)
