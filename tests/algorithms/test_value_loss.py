"""The value loss: the numbers of its definition, its gradients, and what is masked."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.losses import value_clip
from realflow.errors import InputError

number = st.floats(-5, 5)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def all_but_the_first(values):
    """The mask of one sample: its first token follows no state."""
    return torch.arange(len(values)) > 0


@settings(deadline=None)
@given(st.lists(st.tuples(number, number, number), min_size=2, max_size=12), st.floats(0.01, 2))
def test_value_loss_equals_the_definition(rows, clip):
    values, old, returns = (f64(column) for column in zip(*rows, strict=True))
    terms = value_clip(values, old, returns, all_but_the_first(values), clip=clip)
    for i in range(1, len(rows)):
        v, before, target = rows[i - 1][0], rows[i - 1][1], rows[i][2]
        near = min(max(v, before - clip), before + clip)
        wanted = 0.5 * max((v - target) ** 2, (near - target) ** 2)
        assert terms.per_token[i].item() == pytest.approx(wanted, abs=1e-9)
        assert terms.metrics["vpred_mean"][i].item() == v
    assert (terms.metrics["vf_loss"] == terms.per_token).all()


def test_value_loss_without_a_change_is_half_the_square():
    values, returns = f64([0.5, 1.0, 7.0]).requires_grad_(), f64([0.0, 1.5, 0.0])
    terms = value_clip(values, values.detach(), returns, all_but_the_first(values))
    torch.testing.assert_close(terms.per_token[1:], f64([0.5, 0.5]))
    assert (terms.metrics["vf_clipfrac"] == 0).all()
    terms.per_token[1:].sum().backward()
    torch.testing.assert_close(values.grad, f64([-1.0, 1.0, 0.0]))  # the last state has no choice after it


def test_no_gradient_beyond_the_clip_and_none_to_old_values_or_returns():
    values = f64([2.0, 0.0]).requires_grad_()
    old, returns = f64([0.0, 0.0]).requires_grad_(), f64([0.0, 3.0]).requires_grad_()
    terms = value_clip(values, old, returns, all_but_the_first(values), clip=0.2)
    terms.per_token[1].backward()
    assert (values.grad == 0).all() and old.grad is None and returns.grad is None
    assert terms.metrics["vf_clipfrac"][1] == 1
    with pytest.raises(InputError, match="clip must be a number above 0"):
        value_clip(values, old, returns, all_but_the_first(values), clip=0.0)


def test_gradient_of_the_value_loss():
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    old = values.detach() + 0.3 * torch.randn(9, generator=generator, dtype=torch.float64)
    returns = torch.randn(9, generator=generator, dtype=torch.float64)
    mask = all_but_the_first(values)
    assert torch.autograd.gradcheck(lambda v: value_clip(v, old, returns, mask).per_token[1:], (values,))


def test_masked_tokens_have_no_part():
    """The state before a masked token counts for no other, and NaN there does no harm."""
    values, returns = f64([0.5, 1.0, 7.0, 2.0]), f64([math.nan, 1.5, math.nan, 3.0])
    mask = torch.tensor([False, True, False, True])
    for spoilt in (values, f64([0.5, math.nan, 7.0, math.nan])):
        now = spoilt.clone().requires_grad_()
        terms = value_clip(now, spoilt.detach(), returns, mask)
        terms.per_token.sum().backward()
        assert terms.per_token.tolist() == [0, 0.5, 0, 8.0]
        assert now.grad.tolist() == [-1.0, 0.0, 4.0, 0.0]
        assert all((value[~mask] == 0).all() for value in terms.metrics.values())
