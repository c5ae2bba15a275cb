"""Advantages of tokens without a critic: whitening, REINFORCE++, its baseline form, critic-free PPO."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms import advantages, credit
from realflow.errors import InputError

number = st.floats(-5, 5)
token = st.tuples(st.booleans(), number, number)  # mask, logprob, reference
sample = st.tuples(
    st.lists(token, min_size=1, max_size=7), st.one_of(number, number, st.none()), st.integers(0, 3)
)
batches = st.lists(sample, min_size=1, max_size=7)
unit = st.floats(0, 1)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def columns(rows):
    """What a graph gives of (tokens, reward, group) rows."""
    tokens = [entry for row, *_ in rows for entry in row]
    return {
        "rewards": f64([math.nan if reward is None else reward for _, reward, _ in rows]),
        "loss_mask": torch.tensor([chosen for chosen, *_ in tokens], dtype=torch.bool),
        "lengths": torch.tensor([len(row) for row, *_ in rows]),
        "logprobs": f64([logprob for _, logprob, _ in tokens]),
        "ref_logprobs": f64([ref for *_, ref in tokens]),
    }


def groups(rows):
    return torch.tensor([group for *_, group in rows])


def centred(rows):
    """The rewards less the mean of their group, None where there is none."""
    found = []
    for _, reward, group in rows:
        own = [r for _, r, g in rows if g == group and r is not None]
        found.append(None if reward is None else reward - math.fsum(own) / len(own))
    return found


def by_hand(rows, rewards, gamma, kl_coef):
    """The definition, a token at a time: returns of the reward at the end less the KL, then whitened."""
    found, kept = [], []
    for (row, *_), reward in zip(rows, rewards, strict=True):
        own, sum_ = [0.0] * len(row), None
        for i in reversed(range(len(row))):
            chosen, logprob, ref = row[i]
            if not chosen or reward is None:
                continue
            here = -kl_coef * (logprob - ref)
            sum_ = here + reward if sum_ is None else here + gamma * sum_
            own[i] = sum_
            kept.append(len(found) + i)
        found += own
    values = [found[i] for i in kept]
    if len(values) > 1:
        mean, variance = math.fsum(values) / len(values), statistics.variance(values)
        for i in kept:
            found[i] = (found[i] - mean) / math.sqrt(variance + 1e-8)
    return f64(found), kept


def spread(rows, rewards, gamma, kl_coef):
    """Whether the returns differ enough for rounding not to be blown up by whitening."""
    plain = {**columns(rows), "rewards": f64([math.nan if r is None else r for r in rewards])}
    total = -kl_coef * (plain["logprobs"] - plain["ref_logprobs"])
    mask = plain["loss_mask"] & ~plain["rewards"].isnan().repeat_interleave(plain["lengths"])
    ends = advantages.packed.at_last(plain["rewards"], mask, plain["lengths"])
    returns = advantages.packed.returns_to_go(total + ends, mask, plain["lengths"], gamma)[mask]
    return len(returns) < 2 or returns.std() > 1e-2 or returns.std() == 0


@settings(deadline=None, max_examples=80)
@given(batches, unit, unit)
def test_reinforce_pp_equals_the_definition(rows, gamma, kl_coef):
    rewards = [reward for _, reward, _ in rows]
    wanted, kept = by_hand(rows, rewards, gamma, kl_coef)
    found = credit.reinforce_pp(**columns(rows), gamma=gamma, kl_coef=kl_coef)
    assert found.isfinite().all() and (found != 0).sum() <= len(kept)
    if spread(rows, rewards, gamma, kl_coef):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=80)
@given(batches, unit, unit)
def test_its_baseline_form_first_subtracts_the_mean_of_the_group(rows, gamma, kl_coef):
    wanted, _ = by_hand(rows, centred(rows), gamma, kl_coef)
    found = credit.reinforce_pp_baseline(
        **columns(rows), group_ids=groups(rows), gamma=gamma, kl_coef=kl_coef
    )
    assert found.isfinite().all()
    if spread(rows, centred(rows), gamma, kl_coef):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=80)
@given(batches, unit)
def test_critic_free_equals_the_definition(rows, kl_coef):
    rewards = [None if reward is None else (5.0 if reward > 0.5 else -5.0) for _, reward, _ in rows]
    wanted, _ = by_hand(rows, rewards, 1.0, kl_coef)
    found = credit.critic_free(**columns(rows), kl_coef=kl_coef)
    assert found.isfinite().all()
    if spread(rows, rewards, 1.0, kl_coef):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


FUNCTIONS = {
    "reinforce_pp": lambda rows, **options: credit.reinforce_pp(**columns(rows), **options),
    "baseline": lambda rows, **options: credit.reinforce_pp_baseline(
        **columns(rows), group_ids=groups(rows), **options
    ),
    "critic_free": lambda rows, **options: credit.critic_free(**columns(rows), **options),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(deadline=None, max_examples=40)
@given(rows=batches, random=st.randoms(use_true_random=False))
def test_order_does_not_matter_and_the_masked_are_zero(name, rows, random):
    found = FUNCTIONS[name](rows, kl_coef=0.1)
    parts = found.split([len(row) for row, *_ in rows])
    order = random.sample(range(len(rows)), len(rows))
    shuffled = FUNCTIONS[name]([rows[i] for i in order], kl_coef=0.1)
    torch.testing.assert_close(shuffled, torch.cat([parts[i] for i in order]), atol=1e-6, rtol=1e-6)
    assert (found[~columns(rows)["loss_mask"]] == 0).all()
    for (_, reward, _), part in zip(rows, parts, strict=True):
        assert reward is not None or (part == 0).all()


ANSWERED = [(True, -1.0, -1.5), (True, -0.5, -0.25)]
RIGHT_AND_WRONG = [(ANSWERED, 1.0, 0), (ANSWERED, 0.0, 0), (ANSWERED[:1], 1.0, 1), (ANSWERED, None, 1)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_right_is_above_wrong_and_the_negated_below(name):
    found = FUNCTIONS[name](RIGHT_AND_WRONG).split([2, 2, 1, 2])
    assert (found[0] > 0.1).all() and (found[1] < -0.1).all() and (found[3] == 0).all()
    turned = [(row, None if reward is None else 1 - reward, group) for row, reward, group in RIGHT_AND_WRONG]
    assert (FUNCTIONS[name](turned).split([2, 2, 1, 2])[0] < -0.1).all()  # the control


def test_values_of_reinforce_pp():
    """Returns 1, 1 | 0, 0 | 1 without a KL: mean .6, unbiased variance .3."""
    found = FUNCTIONS["reinforce_pp"](RIGHT_AND_WRONG)
    high, low = 0.4 / math.sqrt(0.3), -0.6 / math.sqrt(0.3)
    torch.testing.assert_close(found, f64([high, high, low, low, high, 0, 0]), atol=1e-5, rtol=0)
    biased = 0.4 / math.sqrt(0.24)
    assert abs(found[0].item() - biased) > 0.05  # the control


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_coefficient_that_is_a_field(name):
    by_option = FUNCTIONS[name](RIGHT_AND_WRONG, kl_coef=0.3)
    by_field = FUNCTIONS[name](RIGHT_AND_WRONG, kl_coefs=f64([0.3] * 4))
    torch.testing.assert_close(by_field, by_option)
    assert (FUNCTIONS[name](RIGHT_AND_WRONG) - by_option).abs().max() > 1e-3


def test_rewards_of_tokens_come_in_addition():
    """As if the KL had been a field of its own."""
    given_ = columns(RIGHT_AND_WRONG)
    distance = given_.pop("logprobs") - given_.pop("ref_logprobs")
    found = credit.reinforce_pp(**given_, token_rewards=-0.3 * distance)
    torch.testing.assert_close(found, FUNCTIONS["reinforce_pp"](RIGHT_AND_WRONG, kl_coef=0.3))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_to_learn_from_is_fine(name):
    unwritten = [(False, -1.0, -2.0)] * 3
    for rows in (
        [(unwritten, 1.0, 0), (unwritten, 0.0, 0)],
        [(ANSWERED, None, 0)],
        [(ANSWERED, 1.0, 0), (ANSWERED, 1.0, 0)],
    ):
        found = FUNCTIONS[name](rows)
        assert (found == 0).all() and found.dtype == torch.float64


def test_a_kl_without_a_reference_is_refused():
    given_ = columns(RIGHT_AND_WRONG)
    del given_["ref_logprobs"]
    with pytest.raises(InputError, match=r"kl_coef is 0\.1, but there are no ref_logprobs"):
        credit.reinforce_pp(**given_, kl_coef=0.1)
    with pytest.raises(InputError, match=r"credit.critic_free: kl_coef is a field .* no ref_logprobs"):
        credit.critic_free(**given_, kl_coefs=f64([0.1] * 4))


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), number), min_size=1, max_size=20))
def test_whitened(rows):
    mask, values = torch.tensor([kept for kept, _ in rows]), f64([value for _, value in rows])
    found = advantages.whitened(values, mask)
    assert (found[~mask] == 0).all() and found.isfinite().all()
    kept = values[mask]
    if len(kept) < 2:
        assert torch.equal(found[mask], kept)
    elif kept.std() > 1e-2:
        wanted = (kept - kept.mean()) / kept.std()
        torch.testing.assert_close(found[mask], wanted, atol=1e-3, rtol=1e-3)
        assert abs(found[mask].mean()) < 1e-9
    elif kept.unique().numel() == 1:
        assert (found == 0).all()
    assert advantages.whitened(values.float(), mask).dtype == torch.float32
