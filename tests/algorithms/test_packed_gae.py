"""`advantages.gae`: the numbers of its definition; in torch and compiled; as a system of equations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.advantages import gae
from realflow.algorithms.advantages.gae import gae_in_torch
from realflow.errors import InputError
from realflow.kernels import operator

unit = st.floats(0, 1)
number = st.floats(-5, 5)
token = st.tuples(st.booleans(), number, number)  # mask, reward, value
sample = st.tuples(st.lists(token, max_size=9), st.one_of(st.just(0.0), number))  # and what comes after
batches = st.lists(sample, min_size=1, max_size=6)

REWARDS, VALUES, WANTED = [0.0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4], [0.77329, 0.718012, 0.6603, 0.6]
DECAYS = {"gamma": 0.99, "lam": 0.95}
NO, YES = torch.tensor([False]), torch.tensor([True])


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def columns(rows):
    tokens = [entry for row, _ in rows for entry in row]
    return {
        "token_rewards": f64([reward for _, reward, _ in tokens]),
        "values": f64([value for *_, value in tokens]),
        "lengths": torch.tensor([len(row) for row, _ in rows]),
        "mask": torch.tensor([chosen for chosen, *_ in tokens], dtype=torch.bool),
        "bootstrap": f64([after for _, after in rows]),
    }


def by_equations(rows, gamma, lam):
    """Advantages as what solves `A = d + gamma lam N A`, N being "the next chosen token"."""
    found = []
    for row, after in rows:
        chosen = [i for i, entry in enumerate(row) if entry[0]]
        values = [row[i][2] for i in chosen] + [after]
        delta = [row[i][1] + gamma * values[k + 1] - values[k] for k, i in enumerate(chosen)]
        system = torch.eye(len(chosen), dtype=torch.float64)
        system -= (
            gamma
            * lam
            * torch.diag(torch.ones(max(len(chosen) - 1, 0), dtype=torch.float64), 1)[
                : len(chosen), : len(chosen)
            ]
        )
        own = torch.zeros(len(row), dtype=torch.float64)
        if chosen:
            own[chosen] = torch.linalg.solve(system, f64(delta))
        found.append(own)
    return torch.cat(found)


@pytest.mark.parametrize("before", [0, 2])
def test_values_of_the_definition(before):
    """After a prompt of no and of two tokens, whose numbers do not count."""
    prompt = [9.0] * before
    found, returns = gae(
        f64(prompt + REWARDS),
        f64(prompt + VALUES),
        torch.tensor([before + 4]),
        torch.tensor([False] * before + [True] * 4),
        bootstrap=NO,
        **DECAYS,
    )
    torch.testing.assert_close(found[before:], f64(WANTED), atol=1e-5, rtol=0)
    torch.testing.assert_close(returns[before:], found[before:] + f64(VALUES))
    assert (found[:before] == 0).all() and (returns[:before] == 0).all()


def test_another_lambda_would_be_noticed():
    """The control of the values above."""
    found, _ = gae(
        f64(REWARDS), f64(VALUES), torch.tensor([4]), YES.expand(4), bootstrap=NO, gamma=0.99, lam=0.9
    )
    assert (found - f64(WANTED)).abs().max() > 0.02


def test_a_cut_sample_bootstraps_from_the_value_at_its_last_token():
    given_ = (f64(REWARDS), f64(VALUES), torch.tensor([4]), YES.expand(4))
    cut, told, finished = (gae(*given_, bootstrap=after, **DECAYS)[0] for after in (YES, f64([0.4]), NO))
    decay = 0.99 * 0.95
    more = 0.99 * 0.4 * f64([decay**3, decay**2, decay, 1])
    torch.testing.assert_close(cut - finished, more, atol=1e-12, rtol=0)
    assert torch.equal(cut, told)


def test_a_tools_tokens_are_skipped_and_not_zeroed():
    """Two choices, a tool's two tokens, a choice: as if the third choice came right after the second."""
    mask = torch.tensor([1, 1, 0, 0, 1]).bool()
    rewards, values = f64([0, 0, 5, 5, 1]), f64([0.1, 0.2, 0.9, -0.9, 0.4])
    found, _ = gae(rewards, values, torch.tensor([5]), mask, bootstrap=NO, **DECAYS)
    plain, _ = gae(rewards[mask], values[mask], torch.tensor([3]), YES.expand(3), bootstrap=NO, **DECAYS)
    torch.testing.assert_close(found[mask], plain)
    assert (found[~mask] == 0).all()
    zeroed, _ = gae(rewards * mask, values, torch.tensor([5]), YES.expand(5), bootstrap=NO, **DECAYS)
    assert (zeroed[mask] - found[mask]).abs().max() > 0.05


@settings(deadline=None, max_examples=100)
@given(batches, unit, unit)
def test_equals_the_system_of_equations(rows, gamma, lam):
    given_ = columns(rows)
    found, returns = gae(**given_, gamma=gamma, lam=lam)
    torch.testing.assert_close(found, by_equations(rows, gamma, lam), atol=1e-9, rtol=1e-9)
    wanted = torch.where(given_["mask"], found + given_["values"], 0.0)
    torch.testing.assert_close(returns, wanted, atol=1e-12, rtol=0)
    assert (found[~given_["mask"]] == 0).all()


def test_the_kernel_is_built_for_the_cpu():
    """Otherwise the tests here would compare torch with torch."""
    assert operator("gae", torch.device("cpu")) is not None
    assert operator("gae", torch.device("meta")) is None
    assert operator("no_such_kernel", torch.device("cpu")) is None


@settings(deadline=None, max_examples=100)
@given(batches, unit, unit)
def test_the_kernel_equals_torch(rows, gamma, lam):
    given_ = columns(rows)
    after = given_.pop("bootstrap")
    compiled = gae(**given_, bootstrap=after, gamma=gamma, lam=lam)
    plain = gae_in_torch(**given_, after=after, gamma=gamma, lam=lam)
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def large(count=300):
    """Samples of 0 to 400 tokens, some with gaps: enough for several threads to share."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(0, 400, (count,), generator=generator)
    total = int(lengths.sum())
    rewards, values = torch.randn(2, total, generator=generator, dtype=torch.float64)
    mask = torch.rand(total, generator=generator) < 0.8
    return {"token_rewards": rewards, "values": values, "lengths": lengths, "mask": mask}


def test_many_tokens_and_any_number_of_threads():
    given_ = large()
    after = torch.randn(300, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    plain = gae_in_torch(**given_, after=after, **DECAYS)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            compiled = gae(**given_, bootstrap=after, **DECAYS)
            for one, other in zip(compiled, plain, strict=True):
                torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    finally:
        torch.set_num_threads(before)
    other, _ = gae(**given_, bootstrap=after + 1e-6, **DECAYS)  # the control: a difference is seen
    assert (other - plain[0]).abs().max() > 1e-7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_bits_of_the_cpu():
    given_ = large()
    after = torch.randn(300, dtype=torch.float64)
    here = gae(**given_, bootstrap=after, **DECAYS)
    there = gae(**{name: value.cuda() for name, value in given_.items()}, bootstrap=after.cuda(), **DECAYS)
    assert operator("gae", torch.device("cuda")) is not None
    assert all(torch.equal(one, other.cpu()) for one, other in zip(here, there, strict=True))


@settings(deadline=None, max_examples=60)
@given(batches, st.randoms(use_true_random=False))
def test_order_and_company_do_not_matter(rows, random):
    together, _ = gae(**columns(rows), **DECAYS)
    parts = together.split([len(row) for row, _ in rows])
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled, _ = gae(**columns([rows[i] for i in order]), **DECAYS)
    assert torch.equal(shuffled, torch.cat([parts[i] for i in order]))
    for row, part in zip(rows, parts, strict=True):
        assert torch.equal(gae(**columns([row]), **DECAYS)[0], part)


def test_monte_carlo_and_one_step():
    """lam 1 is the discounted return less the value; lam 0 the error of one step."""
    values, rewards = f64([0.5, -1, 2]), f64([1, 2, 4])
    rest = (torch.tensor([3]), YES.expand(3))
    whole, returns = gae(rewards, values, *rest, gamma=0.5, lam=1.0, bootstrap=NO)
    torch.testing.assert_close(returns, f64([1 + 1 + 1, 2 + 2, 4]))
    torch.testing.assert_close(whole, returns - values)
    step, _ = gae(rewards, values, *rest, gamma=0.5, lam=0.0, bootstrap=f64([0.25]))
    torch.testing.assert_close(step, f64([1 - 0.5 - 0.5, 2 + 1 + 1, 4 + 0.125 - 2]))


def test_nothing_at_all():
    none = torch.zeros(0, dtype=torch.float64)
    for lengths in (torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)):
        after = torch.ones(len(lengths), dtype=torch.bool)
        found, returns = gae(none, none, lengths, none.bool(), bootstrap=after, **DECAYS)
        assert found.shape == returns.shape == (0,)


def test_narrow_numbers_are_computed_in_float64():
    wide = columns([([(True, 0.5, 0.25), (True, 1.0, 0.75)], 0.0)])
    narrow = {**wide, "values": wide["values"].float(), "token_rewards": wide["token_rewards"].float()}
    for one, other in zip(gae(**wide, **DECAYS), gae(**narrow, **DECAYS), strict=True):
        assert one.dtype == other.dtype == torch.float64 and torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.1}, "advantages.gae: gamma must be a number from 0 to 1, not 1.1"),
        ({"lam": -0.1}, "lam must be a number from 0 to 1"),
        ({"values": torch.zeros(3)}, r"values has the shape \(3,\), but the lengths .* add up to 4"),
        ({"lengths": torch.tensor([5])}, "the lengths of the samples add up to 5"),
        ({"lengths": torch.tensor([5, -1])}, "one number >= 0"),
        ({"bootstrap": torch.zeros(2)}, "bootstrap has the shape .* each of the 1 samples"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given_ = {
        "token_rewards": f64(REWARDS), "values": f64(VALUES), "lengths": torch.tensor([4]),
        "mask": YES.expand(4), "bootstrap": NO, **DECAYS,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        gae(**{**given_, **change})
