"""GAE as graphs call it: the definition, and what holds for any samples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.credit import gae
from realflow.algorithms.losses import value_clip
from realflow.errors import InputError

unit = st.floats(0, 1)
number = st.floats(-5, 5)
token = st.tuples(st.booleans(), number, number, number, number)  # mask, value, reward, logp, ref
sample = st.tuples(
    st.lists(token, min_size=1, max_size=9),
    st.sampled_from(["stop", "length", "abort"]),
    st.one_of(number, number, number, st.none()),
)
batches = st.lists(sample, min_size=1, max_size=6)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def columns(rows):
    """What a graph gives `gae` of (tokens, finish reason, reward) rows."""
    tokens = [entry for row, _, _ in rows for entry in row]
    column = {
        name: f64([entry[i] for entry in tokens])
        for i, name in enumerate(("values", "token_rewards", "logprobs", "ref_logprobs"), start=1)
    }
    return {
        **column,
        "rewards": f64([math.nan if reward is None else reward for *_, reward in rows]),
        "loss_mask": torch.tensor([entry[0] for entry in tokens], dtype=torch.bool),
        "finish_reason": [reason for _, reason, _ in rows],
        "lengths": torch.tensor([len(row) for row, _, _ in rows]),
    }


def by_hand(row, reason, reward, gamma, lam, kl_coef):
    """The definition, one token at a time, for one sample: lists of advantages and returns."""
    advantages, returns = [0.0] * len(row), [0.0] * len(row)
    chosen = [i for i, entry in enumerate(row) if entry[0] and i > 0]
    if reward is None:
        for i in chosen:
            returns[i] = row[i - 1][1]
        return advantages, returns, []
    next_value = 0.0 if reason == "stop" else row[-1][1]
    following, last = 0.0, True
    for i in reversed(chosen):
        _, _, own, logprob, ref = row[i]
        total = own - kl_coef * (logprob - ref) + (reward if last else 0.0)
        value = row[i - 1][1]
        following = total + gamma * next_value - value + gamma * lam * following
        advantages[i], returns[i] = following, following + value
        next_value, last = value, False
    return advantages, returns, chosen


def expected(rows, gamma=1.0, lam=0.95, kl_coef=0.0, whiten=False):
    results = [by_hand(*row, gamma, lam, kl_coef) for row in rows]
    places, start = [], 0
    for (row, *_), (_, _, chosen) in zip(rows, results, strict=True):
        places += [start + i for i in chosen]
        start += len(row)
    advantages = [a for result in results for a in result[0]]
    if whiten and len(places) > 1:
        mean = math.fsum(advantages[i] for i in places) / len(places)
        variance = math.fsum((advantages[i] - mean) ** 2 for i in places) / (len(places) - 1)
        for i in places:
            advantages[i] = (advantages[i] - mean) / math.sqrt(variance + 1e-8)
    return f64(advantages), f64([r for result in results for r in result[1]])


def same(found, wanted, atol=1e-9):
    torch.testing.assert_close(found["advantages"], wanted[0], atol=atol, rtol=1e-9)
    torch.testing.assert_close(found["returns"], wanted[1], atol=atol, rtol=1e-9)


@settings(deadline=None, max_examples=60)
@given(batches, unit, unit, unit, st.booleans())
def test_equals_the_definition(rows, gamma, lam, kl_coef, whiten):
    found = gae(**columns(rows), gamma=gamma, lam=lam, kl_coef=kl_coef, whiten=False)
    same(found, expected(rows, gamma, lam, kl_coef))
    if whiten:  # a tiny spread would blow rounding up
        wanted = expected(rows, gamma, lam, kl_coef, whiten=True)
        found = gae(**columns(rows), gamma=gamma, lam=lam, kl_coef=kl_coef)
        same(found, wanted, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(batches, st.randoms(use_true_random=False))
def test_order_and_company_do_not_matter(rows, random):
    """A permutation permutes; without whitening each sample alone gives what it gives among others."""
    together = gae(**columns(rows), kl_coef=0.1, whiten=False)
    lengths = [len(row) for row, *_ in rows]
    parts = {name: value.split(lengths) for name, value in together.items()}
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = gae(**columns([rows[i] for i in order]), kl_coef=0.1, whiten=False)
    for name, value in shuffled.items():
        torch.testing.assert_close(value, torch.cat([parts[name][i] for i in order]), atol=1e-12, rtol=0)
    for index, row in enumerate(rows):
        alone = gae(**columns([row]), kl_coef=0.1, whiten=False)
        for name, value in alone.items():
            torch.testing.assert_close(value, parts[name][index], atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=40)
@given(batches)
def test_whitened_over_the_chosen_tokens_and_zero_elsewhere(rows):
    given_, found = columns(rows), gae(**columns(rows))
    advantages = found["advantages"]
    start, chosen = 0, []
    for row, _, reward in rows:
        chosen += [start + i for i, e in enumerate(row) if e[0] and i > 0 and reward is not None]
        start += len(row)
    rest = torch.ones(len(advantages), dtype=torch.bool)
    rest[chosen] = False
    assert (advantages[rest] == 0).all()
    plain = gae(**given_, whiten=False)
    torch.testing.assert_close(found["returns"], plain["returns"])  # taken before whitening
    if len(chosen) > 1 and plain["advantages"][chosen].std() > 1e-2:
        assert abs(advantages[chosen].mean()) < 1e-9
        assert advantages[chosen].std() == pytest.approx(1.0, abs=1e-3)


def test_a_missing_reward_teaches_nobody():
    rows = [
        ([(False, 0.3, 0, -1, -1), (True, 0.4, 0, -2, -1), (True, 0.5, 0, -1, -3)], "stop", None),
        ([(False, 0.1, 0, -1, -1), (True, 0.2, 0, -2, -1), (True, 0.6, 0, -1, -3)], "length", 1.0),
    ]
    found, alone = gae(**columns(rows)), gae(**columns(rows[1:]))
    assert (found["advantages"][:3] == 0).all()
    torch.testing.assert_close(found["advantages"][3:], alone["advantages"])
    torch.testing.assert_close(found["returns"][1:3], f64([0.3, 0.4]))
    values = columns(rows)["values"].requires_grad_()
    mask = torch.tensor([False, True, True, False, False, False])
    loss = value_clip(values, values.detach(), found["returns"], mask).per_token.sum()
    loss.backward()
    assert (values.grad == 0).all()


@settings(deadline=None, max_examples=40)
@given(batches, number, st.floats(0.1, 3))
def test_a_critic_of_normalised_returns(rows, mean, std):
    """As if it spoke of returns themselves, but that the returns it learns are normalised."""
    given_ = columns(rows)
    scale = {"return_mean": f64([mean] * len(rows)), "return_std": f64([std] * len(rows))}
    found = gae(**given_, **scale, whiten=False)
    plain = gae(**{**given_, "values": given_["values"] * std + mean}, whiten=False)
    torch.testing.assert_close(found["advantages"], plain["advantages"], atol=1e-9, rtol=1e-9)
    counted = plain["returns"] != 0
    wanted = torch.where(counted, (plain["returns"] - mean) / std, 0.0)
    torch.testing.assert_close(found["returns"][counted], wanted[counted], atol=1e-9, rtol=1e-9)
    one = {"return_mean": f64([0.0] * len(rows)), "return_std": f64([1.0] * len(rows))}
    same(gae(**given_, **one, whiten=False), tuple(gae(**given_, whiten=False).values()))


def test_half_a_scale_is_refused():
    given_ = columns([([(False, 0.3, 0, -1, -1), (True, 0.4, 0, -2, -1)], "stop", 1.0)])
    with pytest.raises(InputError, match="return_std is there without return_mean; expected both"):
        gae(**given_, return_std=f64([1.0]))


def test_kinds_of_kl_and_of_numbers():
    rows = [([(False, 0.3, 0, -1, -1), (True, 0.4, 0, -2, -1), (True, 0.5, 0, -1, -3)], "stop", 1.0)]
    given_ = columns(rows)
    k1, k2, none = (
        gae(**given_, whiten=False, lam=1.0, **options)["returns"]
        for options in ({"kl_coef": 0.1}, {"kl_coef": 0.1, "kl": "k2"}, {})
    )
    torch.testing.assert_close(none - k1, f64([0, 0.1 * (-1 + 2), 0.1 * 2]))
    torch.testing.assert_close(none - k2, f64([0, 0.1 * (0.5 + 2), 0.1 * 2]))
    narrow = {**given_, "values": given_["values"].float()}
    assert gae(**narrow)["advantages"].dtype == torch.float32
    by_field = gae(**given_, whiten=False, lam=1.0, kl_coefs=f64([0.1]))["returns"]
    torch.testing.assert_close(by_field, k1)  # a coefficient that is a field stands in place of the option
    given_.pop("ref_logprobs")
    with pytest.raises(InputError, match=r"kl_coef is a field of the graph, but there are no ref_logprobs"):
        gae(**given_, kl_coefs=f64([0.1]))
    with pytest.raises(InputError, match=r"kl_coef is 0\.1, but there are no ref_logprobs"):
        gae(**given_, kl_coef=0.1)
    for wrong in ({"gamma": 1.1}, {"lam": -0.1}, {"kl_coef": -0.1}):
        with pytest.raises(InputError, match=r"must be a number (from 0 to 1|>= 0)"):
            gae(**given_, **wrong)


def test_nothing_to_learn_from_is_fine():
    rows = [([(False, 0.3, 0, -1, -1), (False, 0.4, 0, -2, -1)], "stop", 1.0)]
    for found in (gae(**columns(rows)), gae(**columns([([(True, 1, 0, 0, 0)], "stop", 1.0)]))):
        assert all((value == 0).all() for value in found.values())


def test_long_and_short_samples_together():
    """A thousand tokens beside one: against the recursion of plain floats."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (1000, 2, 37):
        numbers = torch.randn(length, 4, generator=generator, dtype=torch.float64).tolist()
        rows.append(([(i % 7 != 3, *entry) for i, entry in enumerate(numbers)], "length", 0.5))
    same(gae(**columns(rows), gamma=0.99, kl_coef=0.05, whiten=True), expected(rows, 0.99, 0.95, 0.05, True))
