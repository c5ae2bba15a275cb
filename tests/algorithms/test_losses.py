"""Losses and KL estimates: values worked out by hand, gradients, and what holds for any input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.kl import kl_estimate
from realflow.algorithms.losses import aggregate, ppo_clip, sft
from realflow.errors import InputError


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


NEW = f64([-0.5, -1.3, -1, -0.9, -2.5, -0.5, -2.1, -1])
OLD = f64([-1] * 4 + [-2] * 4)
ADVANTAGES = f64([1, 1, -1, -1, -1, -1, 2, 2])
MASK = torch.tensor([True] * 7 + [False])
LENGTHS = torch.tensor([4, 4])
NO_ENTROPY = torch.zeros(8, dtype=torch.float64)


def every(values):
    """A mask of which all tokens count."""
    return torch.ones(len(values), dtype=torch.bool)


def loss(mode="token", **options):
    terms = ppo_clip(NEW, OLD, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.28, **options)
    return aggregate(terms.per_token, MASK, LENGTHS, mode).item()


def test_ppo_values():
    assert loss() == pytest.approx(0.508052, abs=1e-5)
    assert loss("sequence") == pytest.approx(0.589213, abs=1e-5)
    assert loss(dual_clip=3.0) == pytest.approx(0.296383, abs=1e-5)


def test_ppo_values_of_one_token_each():
    new, old, advantages = f64([-1, -2, -0.5, -1.5]), f64([-1.1, -1.5, -0.9, -1.5]), f64([1, -1, 2, -0.5])
    terms = ppo_clip(new, old, advantages, every(new))
    assert terms.per_token.mean().item() == pytest.approx(-0.551293, abs=1e-5)


def test_a_mask_ignored_would_be_noticed():
    """The control: with the last token counted, the value above does not come out."""
    terms = ppo_clip(NEW, OLD, ADVANTAGES, every(NEW), clip_high=0.28)
    assert abs(aggregate(terms.per_token, torch.ones_like(MASK), LENGTHS).item() - 0.508052) > 0.01


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("k1", [0.2, -0.5, 0]), ("k2", [0.02, 0.125, 0]), ("k3", [0.018731, 0.148721, 0])],
)
def test_kl_values(kind, expected):
    found = kl_estimate(f64([-1, -2, -0.5]), f64([-1.2, -1.5, -0.5]), kind)
    torch.testing.assert_close(found, f64(expected), atol=1e-6, rtol=0)


def test_k3_is_clamped_and_finite_in_float32():
    logprobs = torch.tensor([-200.0, 0.0, -1.0], requires_grad=True)
    found = kl_estimate(logprobs, torch.tensor([0.0, -200.0, -1.0]))
    found.sum().backward()
    assert found.isfinite().all() and logprobs.grad.isfinite().all()
    assert found[0].item() == pytest.approx(4.85165e8 - 21, rel=1e-4)  # exp(20) - 1 - 20: not clamped itself


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=20))
def test_k3_is_never_negative(pairs):
    new, ref = f64([a for a, _ in pairs]), f64([b for _, b in pairs])
    assert (kl_estimate(new, ref) >= 0).all()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_gradients(kind):
    """Autograd against finite differences, away from the kinks of the clipping."""
    generator = torch.Generator().manual_seed(7)
    new = (-torch.rand(12, generator=generator, dtype=torch.float64)).requires_grad_()
    old = new.detach() + 0.9 * (torch.rand(12, generator=generator, dtype=torch.float64) - 0.5)
    ref = new.detach() + torch.rand(12, generator=generator, dtype=torch.float64) - 0.5
    advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    entropy = torch.rand(12, generator=generator, dtype=torch.float64).requires_grad_()

    def total(new, entropy):
        options = {"kl_coef": 0.1, "kl": kind, "entropy_coef": 0.01, "dual_clip": 1.3}
        return ppo_clip(new, old, advantages, every(new), ref, entropy=entropy, **options).per_token

    assert torch.autograd.gradcheck(total, (new, entropy))


def test_no_gradient_reaches_the_old_policy():
    old, ref, advantages = (torch.zeros(3, requires_grad=True) for _ in range(3))
    new = torch.full((3,), -0.1, requires_grad=True)
    terms = ppo_clip(new, old, advantages, every(new), ref, kl_coef=0.5)
    terms.per_token.sum().backward()
    assert old.grad is None and ref.grad is None and advantages.grad is None and new.grad is not None


def test_on_policy_gradient_is_that_of_reinforce():
    new = f64([-1.0, -2.0, -0.3]).requires_grad_()
    advantages = f64([1.5, -0.5, 2.0])
    ppo_clip(new, new.detach(), advantages, every(new)).per_token.sum().backward()
    torch.testing.assert_close(new.grad, -advantages)


def test_metrics():
    options = {"clip_high": 0.28, "dual_clip": 3.0, "kl_coef": 0.5, "kl": "k2"}
    terms = ppo_clip(NEW, OLD, ADVANTAGES, every(NEW), OLD, entropy=NO_ENTROPY, **options)
    metrics = terms.metrics
    assert set(metrics) == {"pg_clipfrac", "pg_clipfrac_lower", "ppo_kl", "kl_loss", "pg_loss"}
    # clipped: A > 0 above 1.28 (tokens 0 and 7), A < 0 below 0.8 (token 4)
    torch.testing.assert_close(metrics["pg_clipfrac"], f64([1, 0, 0, 0, 1, 0, 0, 1]))
    torch.testing.assert_close(metrics["pg_clipfrac_lower"], f64([0, 0, 0, 0, 0, 1, 0, 0]))
    torch.testing.assert_close(metrics["ppo_kl"], OLD - NEW)
    torch.testing.assert_close(metrics["kl_loss"], 0.5 * (OLD - NEW) ** 2)
    torch.testing.assert_close(terms.per_token, metrics["pg_loss"] + 0.5 * metrics["kl_loss"])
    assert all(not value.requires_grad for value in metrics.values())


def test_result_has_the_dtype_of_the_model():
    """Advantages arrive in float64 and must not make a float32 loss slow."""
    new = torch.zeros(8, requires_grad=True)
    terms = ppo_clip(new, OLD, ADVANTAGES, MASK, OLD, entropy=torch.zeros(8), kl_coef=0.1)
    assert terms.per_token.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in terms.metrics.values())


def test_extreme_ratios_stay_finite_in_float32():
    new = torch.tensor([-500.0, 0.0, -500.0, 0.0], requires_grad=True)
    old = torch.tensor([0.0, -500.0, 0.0, -500.0])
    terms = ppo_clip(new, old, torch.tensor([1.0, 1, -1, -1]), every(new))
    terms.per_token.sum().backward()
    assert terms.per_token.isfinite().all() and new.grad.isfinite().all()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 1000), st.data())
def test_loss_does_not_depend_on_packing(lengths, seed, data):
    """Samples in another order and cut into two micro-batches give the same sum."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(3, n, generator=generator, dtype=torch.float64) for n in lengths]
    order = data.draw(st.permutations(range(len(rows))))
    cut = data.draw(st.integers(0, len(rows)))

    def total(chosen):
        if not chosen:
            return 0.0
        new, old, advantages = torch.cat([rows[i] for i in chosen], dim=1)
        return ppo_clip(new, old, advantages, every(new)).per_token.sum().item()

    whole = total(range(len(rows)))
    assert total(order[:cut]) + total(order[cut:]) == pytest.approx(whole, rel=1e-9, abs=1e-9)


def test_aggregate_leaves_out_empty_sequences():
    per_token, mask = f64([1, 2, 3, 4, 5]), torch.tensor([True, True, False, False, True])
    lengths = torch.tensor([2, 2, 1])
    assert aggregate(per_token, mask, lengths, "token").item() == pytest.approx(8 / 3)
    assert aggregate(per_token, mask, lengths, "sequence").item() == pytest.approx((1.5 + 5) / 2)
    constant = aggregate(per_token, mask, lengths, {"constant": 10}).item()
    assert constant == pytest.approx((1 + 2 + 5) / (10 * 2))
    for mode in ("token", "sequence", {"constant": 10}):
        assert aggregate(per_token * torch.nan, ~mask & mask, lengths, mode).item() == 0.0
    for wrong in ("tokens", {"constant": 0}, {"other": 1}):
        with pytest.raises(InputError, match="normalise"):
            aggregate(per_token, mask, lengths, wrong)


def test_sft():
    logprobs = torch.tensor([0.0, -1.0, -3.0], requires_grad=True)
    mask = torch.tensor([False, True, True])
    assert aggregate(sft(logprobs, mask).per_token, mask, torch.tensor([3])) == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_high": -1.0}, "clip_high"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"kl_coef": 0.1}, "ref_logprobs"),
        ({"kl_coef": -0.1, "ref_logprobs": OLD}, "kl_coef must be a number >= 0, not -0.1"),
        ({"kl_coef": 0.1, "kl": "k4", "ref_logprobs": OLD}, "k4"),
        ({"entropy_coef": 0.1}, "no entropy was given"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        ppo_clip(NEW, OLD, ADVANTAGES, MASK, **options)
