"""Advantages of samples: values worked out by hand, and what must hold for any rewards and groups."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.advantages import dr_grpo, grpo, lite_ppo, remax, rloo
from realflow.errors import InputError

IN_GROUPS = [grpo, dr_grpo, rloo]
ALL = [*IN_GROUPS, lite_ppo]
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
    for function in IN_GROUPS:
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
    for found in (*(f(values, groups) for f in ALL), *(f(values, groups, eps=0.0) for f in (grpo, lite_ppo))):
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


def test_grpo_is_the_standard_score():
    """Against the standard library, in groups of unequal size that lie among one another."""
    groups = torch.tensor([7, 2, 7, 2, 2, 7, 7])
    values = torch.tensor([0.0, 3.5, 1.0, -1.0, 0.25, 1.0, 0.5], dtype=torch.float64)
    found = grpo(values, groups, eps=0.0)
    for group in (2, 7):
        own = values[groups == group].tolist()
        mean, std = statistics.fmean(own), statistics.stdev(own)
        wanted = torch.tensor([(value - mean) / std for value in own], dtype=torch.float64)
        torch.testing.assert_close(found[groups == group], wanted, atol=1e-12, rtol=0)


@settings(deadline=None)
@given(samples)
def test_lite_ppo_equals_the_definition(rows):
    values, groups = columns(rows)
    known = [reward for reward, _ in rows if reward is not None]
    std = statistics.stdev(known) if len(known) > 1 else 0.0
    wanted = []
    for reward, group in rows:
        own = [r for r, g in rows if g == group and r is not None]
        wanted.append(0.0 if reward is None else (reward - math.fsum(own) / len(own)) / (std + 1.0))
    found = lite_ppo(values, groups, eps=1.0)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=1e-9)


def test_lite_ppo_does_not_blow_up_a_group_that_nearly_agrees():
    values = torch.tensor([1.0, 1.0, 1.0, 0.999, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert grpo(values, groups)[:4].abs().max() > 1  # the control: the std of the group does
    assert lite_ppo(values, groups)[:4].abs().max() < 0.01


@settings(deadline=None)
@given(st.lists(st.tuples(rewards, rewards), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_remax_is_the_difference(rows, random):
    own, greedy = (
        torch.tensor([math.nan if r is None else r for r in column], dtype=torch.float64)
        for column in zip(*rows, strict=True)
    )
    found = remax(own, greedy)
    assert found.tolist() == [0.0 if None in row else row[0] - row[1] for row in rows]
    order = random.sample(range(len(rows)), len(rows))
    assert torch.equal(remax(own[order], greedy[order]), found[order])
    if any(None not in row and row[0] != row[1] for row in rows):
        assert (remax(greedy, own) != found).any()  # the control: the other way round


def test_what_is_not_one_entry_a_sample_is_refused():
    for function in (*ALL, remax):
        with pytest.raises(InputError, match=r"shapes \(3,\) and \(2,\); expected one entry for each sample"):
            function(torch.zeros(3), torch.zeros(2))


def test_dtypes():
    assert grpo(torch.tensor([1.0, 2.0]), torch.tensor([1, 1])).dtype == torch.float32
    assert grpo(torch.tensor([1, 2]), torch.tensor([1, 1])).dtype == torch.float64
    assert grpo(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
