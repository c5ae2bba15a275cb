"""The coefficient of a KL that follows a target."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.algorithms.kl import adapted
from realflow.errors import InputError

SETTINGS = {"target": 6.0, "horizon": 10_000.0, "samples": 256}


def test_values():
    """The numbers of the formula: a quarter too much is cut at a fifth, a tenth is not."""
    assert adapted(0.2, 7.5, **SETTINGS) == pytest.approx(0.2 * (1 + 0.2 * 0.0256), rel=1e-12)
    assert adapted(0.2, 6.6, **SETTINGS) == pytest.approx(0.2 * (1 + 0.1 * 0.0256), rel=1e-12)
    assert adapted(0.2, 0.0, **SETTINGS) == pytest.approx(0.2 * (1 - 0.2 * 0.0256), rel=1e-12)
    assert adapted(0.2, 6.0, **SETTINGS) == 0.2
    assert adapted(0.2, 60.0, **SETTINGS) != pytest.approx(0.2 * (1 + 9 * 0.0256))  # the control: it is cut


@given(st.floats(1e-6, 10), st.floats(-1, 100), st.floats(1e-3, 10), st.integers(0, 1000))
def test_grows_where_the_kl_is_above_its_target_and_stays_positive(coef, kl, target, samples):
    found = adapted(coef, kl, target=target, horizon=1000, samples=samples)
    assert found > 0
    assert (found >= coef) if kl > target else (found <= coef)
    assert abs(found / coef - 1) <= 0.2 * samples / 1000 + 1e-12


def test_reaches_the_target_of_a_policy_that_gives_way():
    """A KL that falls as the coefficient grows ends at its target."""
    coef = 0.01
    for _ in range(3000):
        coef = adapted(coef, 1.0 / coef, target=5.0, horizon=2000, samples=100)
    assert 1.0 / coef == pytest.approx(5.0, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": math.nan}, "the mean KL is nan"),
        ({"target": 0.0}, "a target above 0"),
        ({"coef": -1.0}, "a coefficient >= 0"),
        ({"horizon": 0.0}, "too short"),
        ({"horizon": 51.0}, "too short for steps of 256"),
        ({"samples": -1}, "samples >= 0"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    given_ = {"coef": 0.1, "kl": 1.0, **SETTINGS, **change}
    with pytest.raises(InputError, match=message):
        adapted(given_.pop("coef"), given_.pop("kl"), **given_)
