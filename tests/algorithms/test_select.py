"""Which samples and groups are kept."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.select import best_of, mixed
from realflow.errors import InputError

rewards = st.one_of(st.integers(-3, 3).map(float), st.none())  # few numbers, so that many are equal
samples = st.lists(st.tuples(rewards, st.integers(0, 3)), min_size=1, max_size=20)


def columns(rows):
    values = torch.tensor([math.nan if r is None else r for r, _ in rows], dtype=torch.float64)
    return values, torch.tensor([group for _, group in rows])


@settings(deadline=None)
@given(samples, st.integers(1, 5))
def test_best_of_equals_sorting_each_group(rows, keep):
    wanted = [False] * len(rows)
    for group in {group for _, group in rows}:
        own = [i for i, (reward, other) in enumerate(rows) if other == group and reward is not None]
        for i in sorted(own, key=lambda i: -rows[i][0])[:keep]:  # Python's sort keeps the order of equal ones
            wanted[i] = True
    assert best_of(*columns(rows), keep=keep).tolist() == wanted


@settings(deadline=None)
@given(samples, st.integers(1, 5))
def test_best_of_keeps_the_highest(rows, keep):
    values, groups = columns(rows)
    found = best_of(values, groups, keep=keep)
    for group in groups.unique():
        own = groups == group
        kept, left = values[own & found], values[own & ~found]
        known = int((~values[own].isnan()).sum())
        assert len(kept) == min(keep, known) and not kept.isnan().any()
        left = left[~left.isnan()]
        assert not len(left) or not len(kept) or kept.min() >= left.max()
        assert torch.equal(best_of(values[own], groups[own], keep=keep), found[own])  # alone as among others


@settings(deadline=None)
@given(samples, st.randoms(use_true_random=False))
def test_mixed_equals_counting_different_rewards(rows, random):
    found = mixed(*columns(rows))
    seen = {group: {r for r, g in rows if g == group and r is not None} for _, group in rows}
    assert found.tolist() == [len(seen[group]) > 1 for _, group in rows]
    order = random.sample(range(len(rows)), len(rows))
    assert torch.equal(mixed(*columns([rows[i] for i in order])), found[order])


def test_always_and_never_solved_are_not_mixed():
    values = torch.tensor([1.0, 1, 0, 0, 1, 0, math.nan, 1])
    groups = torch.tensor([5, 5, 9, 9, 1, 1, 1, 7])
    assert mixed(values, groups).tolist() == [False] * 4 + [True] * 3 + [False]
    assert best_of(values, groups).tolist() == [True, False, True, False, True, False, False, True]
    assert mixed(values, torch.zeros(8)).all()  # the control: in one group they are


def test_nothing_and_what_makes_no_sense():
    none = torch.zeros(0)
    assert best_of(none, none.long()).tolist() == mixed(none, none.long()).tolist() == []
    with pytest.raises(InputError, match="keep must be a number >= 1, not 0"):
        best_of(torch.zeros(2), torch.zeros(2), keep=0)
    for function in (best_of, mixed):
        with pytest.raises(InputError, match="one entry for each sample"):
            function(torch.zeros(3), torch.zeros(2))
