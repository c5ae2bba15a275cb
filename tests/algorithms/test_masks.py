"""The mask of M2PO: what it drops, and that neither order nor packing matters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.masks import m2po, selected
from realflow.errors import InputError

gaps = st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, -0.1, 0.2, 0.3, -0.5, 2.0])), max_size=20)


def masked(rows: list[tuple[bool, float]], threshold: float = 0.04) -> torch.Tensor:
    logprobs = torch.zeros(len(rows), dtype=torch.float64)
    prox = torch.tensor([gap for _, gap in rows], dtype=torch.float64)
    return m2po(logprobs, prox, torch.tensor([mask for mask, _ in rows]).bool(), threshold=threshold)


def by_hand(rows: list[tuple[bool, float]], threshold: float = 0.04) -> list[bool]:
    """Drop the largest square, and those that equal it, until the mean of the rest is under the threshold."""
    kept = [i for i, (mask, _) in enumerate(rows) if mask]
    while kept and math.fsum(rows[i][1] ** 2 for i in kept) / len(kept) >= threshold:
        largest = max(rows[i][1] ** 2 for i in kept)
        kept = [i for i in kept if rows[i][1] ** 2 < largest]
    return [i in kept for i in range(len(rows))]


@settings(deadline=None)
@given(gaps)
def test_equals_the_definition(rows: list[tuple[bool, float]]) -> None:
    assert masked(rows).tolist() == by_hand(rows)


@settings(deadline=None)
@given(gaps, st.randoms(use_true_random=False))
def test_order_changes_nothing(rows: list[tuple[bool, float]], random) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    assert masked([rows[i] for i in order]).tolist() == [bool(masked(rows)[i]) for i in order]


def test_a_far_token_goes_and_near_ones_stay() -> None:
    rows = [(True, 0.1), (True, 0.1), (True, 3.0), (False, 0.0), (True, -0.1)]
    assert masked(rows).tolist() == [True, True, False, False, True]
    assert masked(rows, threshold=10.0).tolist() == [True, True, True, False, True], "the control: nothing"
    assert masked([(True, 1.0), (True, 1.0)]).tolist() == [False, False]
    assert masked([]).tolist() == [] and masked([(False, 9.0)]).tolist() == [False]
    with pytest.raises(InputError, match="threshold must be a number above 0"):
        masked(rows, threshold=0.0)


def test_only_selected_answers_with_a_reward_are_learned() -> None:
    mask = torch.tensor([False, True, True, False, True, True, True])
    lengths = torch.tensor([3, 2, 1, 0, 1])
    chosen = torch.tensor([True, True, False, True, True])
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, float("nan")])
    first = [False, True, True, False, False, False, False]
    assert selected(mask, chosen, rewards, lengths).tolist() == first
    assert not selected(mask, chosen, rewards, lengths, above=1.0).any()
    assert selected(mask, chosen, rewards, lengths, above=-1.0)[4], "the control: a reward of 0 is above -1"
