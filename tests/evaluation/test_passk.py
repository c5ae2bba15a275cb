"""pass@k against every choice of k samples, and what must hold of it whatever the numbers are."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.evaluation.passk import pass_at_k

COUNTS = st.integers(1, 200).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))
)  # n, c, k


def by_counting(n: int, c: int, k: int) -> float:
    """The share of choices of k samples among n that hold one of the first c."""
    choices = list(combinations(range(n), k))
    return sum(any(sample < c for sample in choice) for choice in choices) / len(choices)


@pytest.mark.parametrize("n", range(1, 9))
def test_it_is_the_share_of_choices_that_hold_a_right_one(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(by_counting(n, c, k), abs=1e-12), (n, c, k)


def test_the_plain_guess_is_another_one() -> None:
    """The control: 1 - (1 - c/n)^k is biased, and found to be."""
    assert abs(1 - (1 - 1 / 4) ** 2 - by_counting(4, 1, 2)) > 1e-3


@given(COUNTS)
def test_bounds_and_the_first(counts: tuple[int, int, int]) -> None:
    n, c, k = counts
    assert 0.0 <= pass_at_k(n, c, k) <= 1.0
    assert pass_at_k(n, c, 1) == pytest.approx(c / n, abs=1e-12)
    assert (pass_at_k(n, c, n) == 1.0) == (c > 0)


@given(COUNTS)
def test_more_tries_and_more_right_ones_never_lower_it(counts: tuple[int, int, int]) -> None:
    n, c, k = counts
    if k < n:
        assert pass_at_k(n, c, k + 1) >= pass_at_k(n, c, k) - 1e-12
    if c < n:
        assert pass_at_k(n, c + 1, k) >= pass_at_k(n, c, k) - 1e-12


@given(st.floats(0, 1), st.integers(1, 30), st.data())
def test_its_mean_is_the_true_one(p: float, n: int, data: st.DataObject) -> None:
    """Unbiased: where each of n samples is right with probability p, its expectation is 1 - (1 - p)^k."""
    k = data.draw(st.integers(1, n))
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_what_cannot_be_told(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)
