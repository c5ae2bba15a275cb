"""Intervals over problems: how often they hold the truth, and what they are not fooled by."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.evaluation.intervals import estimate, t_quantile

VALUES = st.lists(st.floats(0, 1), min_size=2, max_size=40).filter(lambda v: max(v) - min(v) > 1e-3)


@pytest.mark.parametrize(
    ("freedom", "share", "printed"),
    [(1, 0.975, 12.706), (2, 0.975, 4.303), (3, 0.975, 3.182), (4, 0.975, 2.776), (9, 0.975, 2.262),
     (29, 0.975, 2.045), (99, 0.975, 1.984), (9, 0.95, 1.833), (29, 0.995, 2.756)],
)  # fmt: skip
def test_quantiles_of_t_as_tables_have_them(freedom: int, share: float, printed: float) -> None:
    assert t_quantile(share, freedom) == pytest.approx(printed, rel=2e-3)


def answers(random: np.random.Generator, problems: int, samples: int) -> np.ndarray:
    """Right or wrong, [problems, samples]: half of all, but some problems are far harder than others."""
    hard = random.beta(0.5, 0.5, size=problems)
    return (random.random((problems, samples)) < hard[:, None]).astype(float)


def share_that_holds(how, truth: float, tries: int = 200) -> float:
    """How often the interval of `how(random)` holds the truth."""
    held = 0
    for seed in range(tries):
        found = how(np.random.default_rng(seed))
        held += found.low is not None and found.low <= truth <= found.high
    return held / tries


@pytest.mark.parametrize("problems", [12, 40])
def test_the_interval_holds_the_truth_19_times_of_20(problems: int) -> None:
    def over_problems(random: np.random.Generator):
        return estimate(answers(random, problems, 8).mean(axis=1).tolist(), resamples=1000)

    assert 0.92 <= share_that_holds(over_problems, 0.5) <= 0.985


def test_an_interval_over_samples_would_be_too_narrow() -> None:
    """The control: samples of one problem are alike, so that counting each for itself claims too much."""

    def over_samples(random: np.random.Generator):
        return estimate(answers(random, 40, 8).ravel().tolist(), resamples=1000)

    assert share_that_holds(over_samples, 0.5) < 0.8


def test_the_difference_of_two_models_is_paired() -> None:
    """Problems that are hard for both widen each one's interval, but not that of the difference."""
    random = np.random.default_rng(5)
    hard = random.beta(0.5, 0.5, size=60)
    ours = random.binomial(64, np.clip(hard + 0.05, 0, 1)) / 64
    theirs = random.binomial(64, hard) / 64
    paired = estimate((ours - theirs).tolist())
    assert paired.low is not None and paired.excludes_zero
    assert paired.value == pytest.approx(fmean(ours) - fmean(theirs))
    one, other = estimate(ours.tolist()), estimate(theirs.tolist())
    assert other.high is not None and one.low is not None and one.low < other.high  # apart they cannot tell


@settings(max_examples=40, deadline=None)
@given(VALUES, st.floats(-3, 3), st.floats(0.1, 10))
def test_moving_and_scaling_the_values_moves_and_scales_the_interval(
    values: list[float], shift: float, scale: float
) -> None:
    first = estimate(values, resamples=200)
    second = estimate([shift + scale * value for value in values], resamples=200)
    for name in ("value", "low", "high"):
        assert getattr(second, name) == pytest.approx(shift + scale * getattr(first, name), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_it_lies_among_the_values_and_is_the_same_each_time(values: list[float]) -> None:
    found = estimate(values, resamples=200)
    assert found == estimate(values, resamples=200)
    assert found.low is not None and found.high is not None and found.value is not None
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12
    assert found.problems == len(values)


def test_more_of_the_same_makes_it_narrower_and_another_seed_moves_it_little() -> None:
    values = [0.0, 0.2, 0.4, 0.9, 1.0]
    few, many = estimate(values * 4), estimate(values * 64)
    assert few.low is not None and few.high is not None and many.low is not None and many.high is not None
    assert many.high - many.low < (few.high - few.low) / 3
    other = estimate(values * 4, seed=1)
    assert other.low != few.low and other.low == pytest.approx(few.low, abs=0.03)


@pytest.mark.parametrize(("values", "mean"), [([], None), ([0.5], 0.5), ([1.0] * 9, 1.0), ([0.0] * 9, 0.0)])
def test_no_interval_where_resampling_says_nothing(values: list[float], mean: float | None) -> None:
    found = estimate(values)
    assert (found.value, found.low, found.high, found.problems) == (mean, None, None, len(values))
    assert not found.excludes_zero
