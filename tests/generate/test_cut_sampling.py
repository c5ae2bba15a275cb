"""Drawing from a vocabulary that is cut over ranks, against drawing from the whole one.

The ranks are threads of this process that meet at a barrier.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.data.random import uniform
from realflow.engines.cut_sampling import Cut, draw_cut, restrict_cut
from realflow.engines.sampling import draw, restrict
from realflow.errors import RunError
from realflow.graph.types import Sampling

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
LIMIT = 30
POOL = ThreadPoolExecutor(8)


class Meeting:
    """A gather among threads that counts what it moves."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.largest = 0
        self.sizes: list[int] = []  # of what one rank gives, gather by gather
        self._given: list = [None] * size
        self._barrier = threading.Barrier(size, timeout=LIMIT)

    def gather_of(self, index: int):
        def gather(mine: torch.Tensor) -> torch.Tensor:
            self._given[index] = mine.clone()
            self._barrier.wait()
            every = torch.stack(self._given)
            self._barrier.wait()
            self.largest = max(self.largest, mine.numel())
            if index == 0:
                self.sizes.append(mine.numel())
            return every

        return gather


def on_ranks(ends: list[int], work) -> tuple[list, Meeting]:
    """`work(part of the vocabulary, cut)` on one rank for each end; what each returned or raised."""
    meeting = Meeting(len(ends))
    starts = [0, *ends[:-1]]
    futures = [
        POOL.submit(work, slice(start, end), Cut(start, index, meeting.gather_of(index)))
        for index, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    return [future.exception(LIMIT) or future.result(LIMIT) for future in futures], meeting


def logits_of(batch: int, size: int, seed: int, dtype: torch.dtype, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(batch, size, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


@st.composite
def cuts(draw_from, smallest: int = 1) -> list[int]:
    """Ends of the parts of an unevenly cut vocabulary."""
    sizes = draw_from(st.lists(st.integers(smallest, 300), min_size=1, max_size=5))
    return torch.tensor(sizes).cumsum(0).tolist()


samplings = st.builds(
    Sampling,
    max_new_tokens=st.just(1),
    temperature=st.sampled_from([1.0, 0.7, 0.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 2000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
)


@settings(deadline=None, max_examples=120)
@given(ends=cuts(), seed=st.integers(0, 10_000), sampling=samplings)
def test_the_same_numbers_draw_the_same_tokens(ends, seed, sampling) -> None:
    logits = logits_of(5, ends[-1], seed, torch.float64)
    numbers = uniform(seed, torch.arange(5), 0, 0)
    expected, expected_logprobs = draw(logits, numbers, sampling)
    found, _ = on_ranks(ends, lambda part, cut: draw_cut(logits[:, part], numbers, sampling, cut))
    for tokens, logprobs in found:
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-12, rtol=1e-12)
        assert torch.equal(logprobs, found[0][1])


@settings(deadline=None, max_examples=60)
@given(ends=cuts(), seed=st.integers(0, 10_000), sampling=samplings, dtype=st.sampled_from(DTYPES[1:]))
def test_every_rank_draws_the_same_in_any_dtype(ends, seed, sampling, dtype) -> None:
    """In float32 the number may fall on the other side of a token's edge; bit-equal over ranks it stays."""
    logits = logits_of(6, ends[-1], seed, dtype)
    numbers = uniform(seed, torch.arange(6), 0, 0)
    found, _ = on_ranks(ends, lambda part, cut: draw_cut(logits[:, part], numbers, sampling, cut))
    for tokens, logprobs in found:
        assert torch.equal(tokens, found[0][0])
        assert torch.equal(logprobs, found[0][1])
        assert logprobs.dtype == torch.float32
    tokens, logprobs = found[0]
    kept = logits if sampling.temperature in (0.0, 1.0) else logits.float() / sampling.temperature
    if sampling.temperature:
        kept = restrict(kept, sampling.top_k, sampling.top_p)
    exact = kept.double().softmax(-1)
    mass = exact.gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), mass.log(), atol=1e-5, rtol=1e-5)
    if sampling.temperature == 0.0:
        assert torch.equal(tokens, logits.argmax(-1))
    else:
        upper = exact.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
        assert bool(((numbers >= upper - mass - 1e-5) & (numbers < upper + 1e-5)).all())


@settings(deadline=None, max_examples=120)
@given(
    ends=cuts(),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([1.0, 0.99, 0.5, 0.05]),
    ties=st.booleans(),
    hidden=st.booleans(),
)
def test_restricting_keeps_the_same_tokens(ends, seed, dtype, top_k, top_p, ties, hidden) -> None:
    """Also where logits tie, and where one rank has nothing that can be drawn."""
    logits = logits_of(4, ends[-1], seed, dtype)
    if ties:
        logits = logits.round()
    if hidden and len(ends) > 1:
        logits[:, : ends[0]] = -torch.inf
    expected = restrict(logits, top_k, top_p)
    found, _ = on_ranks(ends, lambda part, cut: restrict_cut(logits[:, part], top_k, top_p, cut))
    whole = torch.cat(found, -1)
    if (dtype == torch.float64 and not ties) or top_p == 1.0:
        assert torch.equal(whole, expected)
    else:  # the nucleus may end one value earlier or later where its mass is `top_p` but for rounding
        for kept, wanted, row in zip(whole, expected, logits, strict=True):
            differing = kept.isfinite() != wanted.isfinite()
            edge = row[differing].unique()
            assert len(edge) <= 1
            if len(edge):
                above = restrict(row[None], top_k, 1.0)[0].double().softmax(-1)
                mass = above[row > edge].sum(), above[row >= edge].sum()
                assert min(abs(float(m) - top_p) for m in mass) < 1e-5, (edge, mass)


@settings(deadline=None, max_examples=40)
@given(ends=cuts(2), seed=st.integers(0, 1000), edge=st.sampled_from([0.0, 1 - 2.0**-53]))
def test_impossible_tokens_are_never_drawn_on_any_rank(ends, seed, edge) -> None:
    size = ends[-1]
    logits = logits_of(3, size, seed, torch.float32)
    possible = torch.rand(3, size, generator=torch.Generator().manual_seed(seed)) < 0.3
    possible[:, seed % size] = True
    logits = logits.masked_fill(~possible, -torch.inf)
    numbers = torch.full((3,), edge, dtype=torch.float64)
    found, _ = on_ranks(
        ends, lambda part, cut: draw_cut(logits[:, part], numbers, Sampling(max_new_tokens=1), cut)
    )
    tokens, logprobs = found[-1]
    assert bool(possible.gather(-1, tokens[:, None]).all())
    assert bool(logprobs.isfinite().all())


def test_what_ranks_tell_each_other_does_not_grow_with_the_vocabulary() -> None:
    """The same few numbers for 90 token ids and for 49,152; each kind of drawing."""
    batch = 3
    numbers = uniform(1, torch.arange(batch), 0, 0)
    for restricted in ({}, {"temperature": 0.0}, {"top_k": 60, "top_p": 0.98}):
        told = []
        for ends in ([40, 90], [20_000, 49_152]):
            options = {**restricted, "top_k": ends[-1] * 2 // 3} if "top_k" in restricted else restricted
            sampling = Sampling(max_new_tokens=1, **options)
            logits = logits_of(batch, ends[-1], 1, torch.float32, spread=0.1)  # flat: top-p keeps most of it
            found, meeting = on_ranks(
                ends,
                lambda part, cut: draw_cut(logits[:, part], numbers, sampling, cut),  # noqa: B023
            )
            assert meeting.largest <= batch * 256
            assert torch.equal(found[0][0], draw(logits, numbers, sampling)[0])
            told.append(meeting.sizes)
        assert told[0] == told[1] and sum(told[0]) <= batch * (5 + 8 * 256 + 2), told
    _, meeting = on_ranks([20_000, 49_152], lambda part, cut: cut.gather(torch.zeros(batch, 24_576)))
    assert meeting.sizes == [batch * 24_576], "the control: gathered logits would show"


def test_greedy_takes_the_smallest_of_equal_tokens() -> None:
    logits = torch.zeros(1, 9, dtype=torch.bfloat16)
    logits[0, [5, 7, 8]] = 1.0
    sampling = Sampling(max_new_tokens=1, temperature=0.0)
    found, _ = on_ranks(
        [3, 6, 9], lambda part, cut: draw_cut(logits[:, part], torch.zeros(1).double(), sampling, cut)
    )
    assert [tokens.item() for tokens, _ in found] == [5, 5, 5]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_logits_of_one_rank_are_an_error_on_all(bad) -> None:
    logits = logits_of(2, 10, 1, torch.float32)
    logits[1, 3] = bad
    for sampling in (Sampling(max_new_tokens=1), Sampling(max_new_tokens=1, top_k=3, top_p=0.9)):
        numbers = torch.tensor([0.1, 0.2]).double()
        found, _ = on_ranks([5, 10], lambda part, cut: draw_cut(logits[:, part], numbers, sampling, cut))  # noqa: B023
        assert all(isinstance(error, RunError) and "not finite" in str(error) for error in found)


def test_a_part_that_is_shifted_gives_other_tokens() -> None:
    """The control: two ranks' logits in each other's place."""
    logits, numbers = logits_of(40, 100, 3, torch.float64), uniform(3, torch.arange(40), 0, 0)
    sampling = Sampling(max_new_tokens=1)
    expected, _ = draw(logits, numbers, sampling)
    found, _ = on_ranks(
        [50, 100], lambda part, cut: draw_cut(logits[:, part].roll(1, -1), numbers, sampling, cut)
    )
    assert not torch.equal(found[0][0], expected)
