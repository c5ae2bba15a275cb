"""Chunked log probabilities and entropies against log_softmax."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.layout import cut
from realflow.models import logprobs
from realflow.models.logprobs import Vocabulary, token_logprobs, token_stats
from realflow.models.place import Axis


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


class Meeting:
    """All-reduces of threads that stand for ranks; terms are added in the order of ranks."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.terms: dict[int, torch.Tensor] = {}
        self.local = threading.local()

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None
    ) -> None:
        self.terms[self.local.rank] = tensor
        self.barrier.wait()
        terms = torch.stack([self.terms[rank] for rank in range(self.size)])
        total = terms.amax(0) if op == torch.distributed.ReduceOp.MAX else terms.sum(0)
        self.barrier.wait()
        tensor.copy_(total)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def as_rank(rank: int) -> Any:
            self.local.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(as_rank, range(self.size)))


def cut_stats(problem_of: tuple, parts: int, temperature: float, skew: int = 0) -> list[tuple]:
    """Each rank's logprobs, entropies and gradients of rows and weight, the vocabulary being cut."""
    hidden, weight, targets = problem_of
    meeting = Meeting(parts)
    pull = torch.linspace(-1, 2, len(targets), dtype=hidden.dtype)

    def rank(index: int) -> tuple:
        start, stop = cut(len(weight), parts, index)
        mine = weight[start:stop].detach().requires_grad_()
        rows = hidden.detach().requires_grad_()
        vocabulary = Vocabulary(Axis(tuple(range(parts)), index, None), start + skew)
        options = {"temperature": temperature, "vocabulary": vocabulary}
        stats = token_stats(rows, mine, targets, **options)
        assert torch.equal(token_logprobs(rows, mine, targets, **options), stats.logprobs)
        ((pull * stats.logprobs).sum() + 0.7 * stats.entropy.square().sum()).backward()
        return stats.logprobs.detach(), stats.entropy.detach(), rows.grad, mine.grad

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", meeting.all_reduce)
        return meeting.run(rank)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(4, 40), st.integers(2, 4), st.floats(0.3, 3))
def test_a_cut_vocabulary_gives_the_numbers_of_a_whole_one(
    rows: int, vocabulary: int, parts: int, temperature: float
) -> None:
    hidden, weight, targets = problem(rows, vocabulary, torch.float64, seed=rows)
    found = cut_stats((hidden, weight, targets), parts, temperature)
    stats = plain(hidden, weight, targets, temperature)
    pull = torch.linspace(-1, 2, rows, dtype=torch.float64)
    ((pull * stats[0]).sum() + 0.7 * stats[1].square().sum()).backward()
    for part in found:
        torch.testing.assert_close(part[:2], stats, rtol=0, atol=1e-11)
        assert torch.equal(part[0], found[0][0]) and torch.equal(part[1], found[0][1])
    torch.testing.assert_close(sum(part[2] for part in found), hidden.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat([part[3] for part in found]), weight.grad, rtol=0, atol=1e-10)


def test_control_a_part_that_starts_elsewhere_shows() -> None:
    arguments = problem(20, 30, torch.float64)
    found = cut_stats(arguments, 3, 1.0, skew=1)
    assert (found[0][0] - plain(*arguments, 1.0)[0]).abs().max() > 1e-3
