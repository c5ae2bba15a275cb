"""Advantages: values worked out by hand, and what must hold for any rewards and groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.advantages import dr_grpo, grpo, rloo

ALL = [grpo, dr_grpo, rloo]
REWARDS = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 0], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])

rewards = st.one_of(st.floats(-100, 100), st.none())
samples = st.lists(st.tuples(rewards, st.integers(0, 4)), min_size=1, max_size=24)


def columns(rows):
    values = torch.tensor([math.nan if r is None else r for r, _ in rows], dtype=torch.float64)
    return values, torch.tensor([g for _, g in rows])


def by_hand(rows, kind, eps=1e-6):
    """The definitions of the papers, one sample at a time."""
    out = []
    for reward, group in rows:
        own = [r for r, g in rows if g == group and r is not None]
        if reward is None or len(own) < 2:
            out.append(0.0)
            continue
        mean = math.fsum(own) / len(own)
        if kind == "rloo":
            out.append(reward - (math.fsum(own) - reward) / (len(own) - 1))
        elif kind == "dr_grpo":
            out.append(reward - mean)
        else:
            std = math.sqrt(math.fsum((r - mean) ** 2 for r in own) / (len(own) - 1))
            out.append((reward - mean) / (std + eps))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (grpo, [0.866024, -0.866024, -0.866024, 0.866024, 0.499999, 0.499999, 0.499999, -1.499997]),
        (dr_grpo, [0.5, -0.5, -0.5, 0.5, 0.25, 0.25, 0.25, -0.75]),
        (rloo, [2 / 3, -2 / 3, -2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3, -1]),
    ],
)
def test_values(function, expected):
    torch.testing.assert_close(
        function(REWARDS, GROUPS), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_biased_std_would_be_noticed():
    """The control: with the biased std the values above do not come out."""
    biased = (REWARDS[:4] - REWARDS[:4].mean()) / (REWARDS[:4].std(correction=0) + 1e-6)
    assert (biased - grpo(REWARDS, GROUPS)[:4]).abs().max() > 0.1


@settings(deadline=None)
@given(samples)
def test_equals_the_definition(rows):
    values, groups = columns(rows)
    for function in (dr_grpo, rloo):
        expected = by_hand(rows, function.__name__)
        torch.testing.assert_close(function(values, groups), expected, atol=1e-9, rtol=1e-9)
    # eps = 1: a tiny spread of the rewards would make rounding visible in the quotient
    expected = by_hand(rows, "grpo", eps=1.0)
    torch.testing.assert_close(grpo(values, groups, eps=1.0), expected, atol=1e-9, rtol=1e-9)


@settings(deadline=None)
@given(samples, st.randoms(use_true_random=False))
def test_neither_order_nor_names_of_groups_matter(rows, random):
    values, groups = columns(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    names = torch.tensor(random.sample(range(1000), 5))
    for function in ALL:
        shuffled = function(values[order], names[groups[order]])
        torch.testing.assert_close(shuffled, function(values, groups)[order], atol=1e-9, rtol=1e-7)


@settings(deadline=None)
@given(samples)
def test_a_group_alone_equals_the_group_among_others(rows):
    values, groups = columns(rows)
    for function in ALL:
        together = function(values, groups)
        for group in groups.unique():
            own = groups == group
            torch.testing.assert_close(function(values[own], groups[own]), together[own])


@settings(deadline=None)
@given(samples)
def test_finite_and_zero_for_the_missing_and_sum_zero(rows):
    values, groups = columns(rows)
    for function in ALL:
        found = function(values, groups)
        assert found.isfinite().all()
        assert (found[values.isnan()] == 0).all()
        for group in groups.unique():
            assert abs(found[groups == group].sum()) < 1e-6


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.integers(1, 20))
def test_equal_rewards_have_advantage_exactly_zero(value, count):
    values, groups = torch.full((count,), value, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
    for found in (*(f(values, groups) for f in ALL), grpo(values, groups, eps=0.0)):
        assert (found == 0).all()


def test_a_missing_reward_is_not_a_zero():
    values = torch.tensor([1.0, math.nan, 0.0, 1.0])
    groups = torch.tensor([3, 3, 3, 3])
    kept = torch.tensor([True, False, True, True])
    for function in ALL:
        found = function(values, groups)
        torch.testing.assert_close(found[kept], function(values[kept], groups[kept]))
        as_zero = function(values.nan_to_num(), groups)
        assert (found - as_zero).abs().max() > 0.05


def test_dtypes():
    assert grpo(torch.tensor([1.0, 2.0]), torch.tensor([1, 1])).dtype == torch.float32
    assert grpo(torch.tensor([1, 2]), torch.tensor([1, 1])).dtype == torch.float64
    assert grpo(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
