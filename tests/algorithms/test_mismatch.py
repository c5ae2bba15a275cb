"""Importance weights of the trainer over the rollout, and how far apart the two are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.mismatch import MODES, distances, importance, monitor, noise_floor
from realflow.errors import InputError
from realflow.graph.builtins import BUILTINS

logprob = st.floats(-30, 0)
tokens = st.lists(st.tuples(st.booleans(), logprob, logprob), min_size=1, max_size=30)


def columns(rows):
    mask, own, behaviour = zip(*rows, strict=True)
    return (
        torch.tensor(own, dtype=torch.float64),
        torch.tensor(behaviour, dtype=torch.float64),
        torch.tensor(mask),
    )


@settings(deadline=None)
@given(tokens, st.floats(0.1, 10), st.floats(0, 1), st.floats(1, 10))
def test_importance_equals_the_definition(rows, cap, low, high):
    none = importance(*columns(rows), mode="none").tolist()
    assert none == [float(chosen) for chosen, _, _ in rows]
    truncated = importance(*columns(rows), cap=cap).tolist()
    masked = importance(*columns(rows), mode="masked", low=low, high=high).tolist()
    for (chosen, own, behaviour), one, other in zip(rows, truncated, masked, strict=True):
        ratio = math.exp(max(-20.0, min(20.0, own - behaviour)))
        assert one == pytest.approx(min(ratio, cap) if chosen else 0.0, rel=1e-12)
        if min(abs(ratio - low), abs(ratio - high)) > 1e-9:
            assert other == pytest.approx(ratio if chosen and low <= ratio <= high else 0.0, rel=1e-12)


@settings(deadline=None)
@given(tokens, st.randoms(use_true_random=False))
def test_each_token_by_itself(rows, random):
    order = random.sample(range(len(rows)), len(rows))
    for mode in MODES:
        found = importance(*columns(rows), mode=mode)
        assert torch.equal(importance(*columns([rows[i] for i in order]), mode=mode), found[order])


@settings(deadline=None)
@given(tokens)
def test_distances_equal_numpys(rows):
    found = distances(*columns(rows))
    sizes = np.abs([own - behaviour for chosen, own, behaviour in rows if chosen])
    if not len(sizes):
        assert found == {}
        return
    assert found["abs_mean"] == pytest.approx(sizes.mean(), rel=1e-12)
    assert found["q99"] == pytest.approx(np.quantile(sizes, 0.99), rel=1e-12)
    outside = [
        not math.log(0.5) <= own - behaviour <= math.log(5) for chosen, own, behaviour in rows if chosen
    ]
    assert found["frac_outside"] == pytest.approx(np.mean(outside), abs=1e-12)


def test_a_quantile_sees_what_a_mean_does_not():
    """Of a thousand tokens twenty are far off."""
    own = torch.full((1000,), -1.0)
    behaviour = own.clone()
    behaviour[::50] -= 3.0
    found = monitor(own, behaviour, torch.ones(1000).bool())
    assert found == {
        "metrics": {
            "mismatch/abs_mean": pytest.approx(0.06),
            "mismatch/q99": pytest.approx(3.0),
            "mismatch/frac_outside": pytest.approx(0.02),
        }
    }
    same = monitor(own, own, torch.ones(1000).bool())["metrics"]  # the control
    assert set(same.values()) == {0.0}


@settings(deadline=None)
@given(tokens, st.randoms(use_true_random=False))
def test_the_noise_floor_is_the_same_measure_of_the_trainer_and_itself(rows, random):
    own, again, mask = columns(rows)
    found = noise_floor(own, again, mask, low=0.4, high=3.0)["metrics"]
    differences = np.array([x - y for chosen, x, y in rows if chosen])
    if not len(differences):
        assert found == {}
        return
    outside = [not math.log(0.4) <= difference <= math.log(3) for difference in differences]
    assert found == {
        "mismatch/noise/abs_mean": pytest.approx(np.abs(differences).mean(), rel=1e-12),
        "mismatch/noise/q99": pytest.approx(np.quantile(np.abs(differences), 0.99), rel=1e-12),
        "mismatch/noise/frac_outside": pytest.approx(np.mean(outside), abs=1e-12),
    }
    order = random.sample(range(len(rows)), len(rows))
    mixed = noise_floor(*columns([rows[i] for i in order]), low=0.4, high=3.0)["metrics"]
    assert mixed == pytest.approx(found, rel=1e-12)
    # Controls: other numbers of one token are seen, and nothing is without them.
    assert set(noise_floor(own, own, mask)["metrics"].values()) == {0.0}
    other = noise_floor(own, again - 100 * mask, mask)["metrics"]
    assert other["mismatch/noise/abs_mean"] > found["mismatch/noise/abs_mean"] + 30


def test_no_token_no_number():
    assert monitor(torch.zeros(3), torch.zeros(3), torch.zeros(3).bool()) == {"metrics": {}}
    assert noise_floor(torch.zeros(3), torch.zeros(3), torch.zeros(3).bool()) == {"metrics": {}}


def test_a_policy_that_agrees_has_weight_one_and_no_gradient_flows():
    own = torch.tensor([-1.0, -2.0, -3.0]).requires_grad_()
    for mode in MODES:
        found = importance(own, own.detach(), torch.tensor([True, True, False]), mode=mode)
        assert found.tolist() == [1.0, 1.0, 0.0]
        assert found.dtype == torch.float32 and not found.requires_grad


def test_declared_modes_are_those_of_the_function():
    assert BUILTINS["mismatch.importance"].choices == {"mode": MODES}


def test_options_that_make_no_sense():
    args = (torch.zeros(2), torch.zeros(2), torch.ones(2))
    for wrong in ({"cap": 0}, {"low": 1.5}, {"high": 0.5}, {"mode": "both"}):
        with pytest.raises(InputError, match=r"mismatch.importance: .*(must be|unknown mode 'both')"):
            importance(*args, **wrong)
    with pytest.raises(InputError, match=r"mismatch.monitor: low must be"):
        monitor(*args, low=-1)
    with pytest.raises(InputError, match=r"mismatch.noise_floor: high must be"):
        noise_floor(*args, high=0.5)
