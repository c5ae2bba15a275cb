"""The coefficient of adaptive KL and the scale of returns, step after step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from realflow.algorithms.running import adaptive_kl, normalise_returns
from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph

LENGTHS = torch.tensor([3, 0, 2])
MASK = torch.tensor([False, True, True, True, False])
floats = st.floats(-5, 5)


def kl_step(kl: float, coef: float, **options: float) -> dict:
    """One step whose KL is `kl` on every token that counts, and far off on the others."""
    ref = -torch.ones(5, dtype=torch.float64)
    logprobs = torch.where(MASK, ref + kl, ref + 100)
    return adaptive_kl(logprobs, ref, MASK, LENGTHS, state={"kl_coef": coef}, **options)


class Controller:
    """TRL's AdaptiveKLController (experimental/ppo and before), as it is published."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current: float, n_steps: int) -> None:
        proportional_error = np.clip(current / self.target - 1, -0.2, 0.2)
        self.value *= 1 + proportional_error * n_steps / self.horizon


@given(st.lists(floats, min_size=1, max_size=8), st.floats(1e-3, 1), st.floats(0.01, 2), st.floats(10, 1e4))
def test_a_run_of_steps_against_the_published_controller(
    kls: list[float], coef: float, target: float, horizon: float
) -> None:
    theirs, state = Controller(coef, target, horizon), {"kl_coef": coef}
    for kl in kls:
        found = kl_step(kl, state["kl_coef"], target=target, horizon=horizon)
        assert torch.allclose(found["kl_coef"], torch.full((3,), theirs.value, dtype=torch.float64))
        theirs.update(kl, len(LENGTHS))
        state = found["state"]
        assert state["kl_coef"] == pytest.approx(theirs.value, rel=1e-9)
        assert found["metrics"]["actor/reward_kl_penalty"] == pytest.approx(kl, abs=1e-9)


def test_it_grows_above_the_target_and_falls_below() -> None:
    up, stays, down = (kl_step(kl, 0.5, target=0.2, horizon=30)["state"]["kl_coef"] for kl in (1, 0.2, 0))
    assert up == pytest.approx(0.5 * 1.02) and down == pytest.approx(0.5 * 0.98)
    assert stays == pytest.approx(0.5, abs=1e-12)


@given(st.floats(-3, 3), st.floats(0.01, 2))
def test_without_a_target_the_coefficient_stays(kl: float, coef: float) -> None:
    """The KL is reported all the same; the control is a target, which moves it."""
    found = kl_step(kl, coef, target=0.0, horizon=30)
    assert found["state"] == {"kl_coef": coef} and found["kl_coef"].tolist() == [coef] * 3
    assert found["metrics"]["actor/reward_kl_penalty"] == pytest.approx(kl, abs=1e-9)
    assert kl_step(3.0, coef, target=0.5, horizon=30)["state"]["kl_coef"] > coef


def test_a_batch_without_tokens_changes_nothing() -> None:
    empty = torch.zeros(5, dtype=torch.bool)
    found = adaptive_kl(torch.zeros(5), torch.ones(5), empty, LENGTHS, state={"kl_coef": 0.3})
    assert found["state"] == {"kl_coef": pytest.approx(0.3)}


START = {"mean": 0.0, "square": 0.0, "weight": 0.0, "first_mean": 0.0, "first_std": 1.0}


@given(st.lists(st.lists(floats, min_size=1, max_size=6), min_size=1, max_size=6), st.floats(0, 0.999))
def test_moments_against_weighted_sums(steps: list[list[float]], beta: float) -> None:
    state = dict(START)
    for index, rewards in enumerate(steps):
        found = normalise_returns(torch.tensor(rewards), state=state, beta=beta, floor=1e-3)
        state = found["state"]
        weights = [beta ** (index - i) for i in range(index + 1)]
        means = [float(np.mean(np.float32(r).astype(float))) for r in steps[: index + 1]]
        squares = [float(np.mean(np.float32(r).astype(float) ** 2)) for r in steps[: index + 1]]
        mean = float(np.average(means, weights=weights))
        variance = float(np.average(squares, weights=weights)) - mean**2
        assert found["return_mean"].tolist() == [pytest.approx(mean, abs=1e-9)] * len(rewards)
        assert found["return_std"][0] ** 2 == pytest.approx(max(variance, 1e-6), abs=1e-9)


@given(
    st.lists(st.lists(floats, min_size=2, max_size=6), min_size=1, max_size=6),
    st.floats(0, 0.999),
    st.floats(-50, 50),
    st.floats(0.1, 20),
)
def test_anchored_to_the_first_step(
    steps: list[list[float]], beta: float, shift: float, scale: float
) -> None:
    """In the first step the critic's numbers mean what they say; later targets stand to the first step's mean
    and deviation as they do to the running ones. Rewards `shift + scale x` give targets that are so too."""
    assume(all(torch.tensor(step).std(correction=0) > 0.1 for step in steps))
    states = [dict(START) for _ in range(3)]
    first = torch.tensor(steps[0], dtype=torch.float64)
    for index, rewards in enumerate(steps):
        x = torch.tensor(rewards, dtype=torch.float64)
        rows = (x, x, shift + scale * x)
        plain, mine, other = (
            normalise_returns(row, state=state, beta=beta, floor=1e-9, anchored=anchored)
            for row, state, anchored in zip(rows, states, (False, True, True), strict=True)
        )
        if index == 0:
            assert (float(mine["return_mean"][0]), float(mine["return_std"][0])) == (0.0, 1.0)
        standard, ours, theirs = (
            (row - found["return_mean"]) / found["return_std"]
            for row, found in zip(rows, (plain, mine, other), strict=True)
        )
        wanted = first.mean() + first.std(correction=0) * standard
        assert torch.allclose(ours, wanted, rtol=1e-6, atol=1e-6)
        assert torch.allclose(theirs, shift + scale * ours, rtol=1e-5, atol=1e-5)
        assert mine["metrics"] == plain["metrics"]
        states = [found["state"] for found in (plain, mine, other)]


def test_rewards_that_grow_leave_anchored_targets_where_they_were() -> None:
    """Without an anchor they are at 0; without a memory (the control) they go where the rewards go."""
    rewards = torch.tensor([4.0, 6.0, 8.0], dtype=torch.float64)
    ends = []
    for beta, anchored in ((0.5, True), (0.5, False), (1.0, True)):
        state: dict = dict(START)
        for step in range(60):
            now = rewards * (3.0 if step else 1.0)
            found = normalise_returns(now, state=state, beta=beta, anchored=anchored)
            state = found["state"]
        ends.append(float(((now - found["return_mean"]) / found["return_std"]).mean()))
    assert ends == [pytest.approx(6, abs=1e-6), pytest.approx(0, abs=1e-6), pytest.approx(18, abs=1e-6)]


def test_the_anchor_waits_for_the_first_reward() -> None:
    nothing = normalise_returns(torch.tensor([math.nan]), state=START, anchored=True)
    assert nothing["state"] == START and float(nothing["return_std"][0]) == 1.0
    found = normalise_returns(torch.tensor([3.0, 5.0]), state=nothing["state"], anchored=True)
    assert (found["state"]["first_mean"], found["state"]["first_std"]) == (pytest.approx(4), pytest.approx(1))


def test_a_memory_of_one_keeps_returns_as_they_are() -> None:
    state: dict = dict(START)
    for rewards in ([1.0, 7.0], [-20.0, 3.0]):
        for anchored in (False, True):
            found = normalise_returns(torch.tensor(rewards), state=state, beta=1.0, anchored=anchored)
            assert (found["return_mean"].tolist(), found["return_std"].tolist()) == ([0.0] * 2, [1.0] * 2)
        state = found["state"]


@given(st.permutations([0.0, 1.0, 1.0, math.nan, -2.0]))
def test_order_and_missing_rewards(rewards: list[float]) -> None:
    found = normalise_returns(torch.tensor(rewards), state=START, beta=0.5)
    there = torch.tensor([0.0, 1.0, 1.0, -2.0], dtype=torch.float64)
    assert float(found["return_mean"][0]) == pytest.approx(float(there.mean()))
    assert float(found["return_std"][0]) == pytest.approx(float(there.std(correction=0)))
    assert len(found["return_mean"]) == 5


def test_nothing_seen_and_all_equal() -> None:
    nothing = normalise_returns(torch.tensor([math.nan]), state=START)
    assert (nothing["return_mean"].item(), nothing["return_std"].item()) == (0.0, 1.0)
    assert nothing["state"] == START
    equal = normalise_returns(torch.ones(4), state=START, floor=0.25)
    assert float(equal["return_mean"][0]) == pytest.approx(1.0)
    assert float(equal["return_std"][0]) == 0.25


def test_options_out_of_range() -> None:
    with pytest.raises(InputError, match="target must be"):
        kl_step(0.1, 0.1, target=-1.0)
    with pytest.raises(InputError, match="beta must be"):
        normalise_returns(torch.ones(2), state=START, beta=1.5)


def test_credit_reads_what_they_write() -> None:
    """In the graph of PPO, which has a call for each; without them it reads nothing of them."""
    graph = load_graph(find_graph("ppo"))
    mapping = graph_to_mapping(graph)
    del mapping["calls"]["kl"], mapping["calls"]["scale"]
    plain = load_graph(mapping)
    fields = {"kl_coef", "return_mean", "return_std"}
    assert fields <= set(graph.call("credit").reads.values())
    assert not fields & set(plain.call("credit").reads.values())
