"""What goes from step to step: the coefficient of adaptive KL, and the scale of returns.

Each is given what it kept as `state` and returns it beside its fields; both see the whole batch, so that no
layout changes what they keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from realflow.algorithms.kl import adapted, kl_estimate
from realflow.graph.builtins import check_options


def adaptive_kl(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    lengths: torch.Tensor,
    *,
    state: Mapping[str, Any],
    kl_coef: float = 0.1,
    target: float = 0.1,
    horizon: float = 10000.0,
) -> dict[str, Any]:
    """The coefficient of the KL penalty in the reward, steered so that the KL comes to `target`.

    `realflow.algorithms.kl.adapted`, once a step: it grows while the KL is above the target. With a `target`
    of 0 it stays what it is, and the KL is only reported. The KL is the mean of k1, `logprobs - ref_logprobs`
    (packed, float [T]), over all tokens of the batch in `loss_mask` (bool [T]); the batch's samples
    (`lengths`, int64 [S]) are counted against `horizon`. **Choice**: the mean over tokens, not that of the
    sums over a response.

    The step's own penalty has the coefficient of before (`kl_coef` at the start), the next step's the new
    one. Returns `kl_coef` (float64 [S], the same for all samples), `state` and `metrics`. Raises InputError
    for an option out of range.
    """
    check_options("running.adaptive_kl", kl_coef=kl_coef, target=target, horizon=horizon)
    coef, mask = float(state["kl_coef"]), loss_mask.bool()
    found = kl_estimate(logprobs.detach().double(), ref_logprobs.detach(), "k1")[mask]
    kl = float(found.mean()) if len(found) else target  # without any token nothing is learned of it
    after = adapted(coef, kl, target=target, horizon=horizon, samples=len(lengths)) if target else coef
    return {
        "kl_coef": torch.full((len(lengths),), coef, dtype=torch.float64),
        "state": {"kl_coef": after},
        "metrics": {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": coef},
    }


def normalise_returns(
    rewards: torch.Tensor,
    *,
    state: Mapping[str, Any],
    beta: float = 0.99,
    floor: float = 0.1,
    anchored: bool = False,
) -> dict[str, Any]:
    """Mean and standard deviation of returns so far, for a critic that predicts `(return - mean) / std`.

    Running means of the rewards (float [S]; NaN, a missing one, is left out) and of their squares, in which
    a step counts `beta` times as much as the one after it, corrected for having started at nothing (as
    PopArt's value normalisation does in MAPPO, arXiv 2103.01955, appendix). With gamma 1 the return of a
    token is its sample's reward, so that these are the returns' own. `std` is at least `floor`; where no
    reward was ever seen, the mean is 0 and `std` 1. With a `beta` of 1 that is so for ever: returns stay as
    they are.

    A critic that starts from a reward model says returns as they are, and has learnt nothing of their scale.
    With `anchored` what is given is relative to the first step that had rewards (m, s): `std / s` and
    `mean - m std / s`, 1 and 0 in that step, so that the critic's numbers keep their meaning. Its targets
    have the mean m and the deviation s of that step from there on. (PopArt, arXiv 1602.07714, section 2,
    keeps meanings by rewriting the head instead.)

    Returns `return_mean` and `return_std` (float64 [S], the same for all samples), `state` and `metrics`,
    which are the mean and deviation themselves. Raises InputError for an option out of range.
    """
    check_options("running.normalise_returns", beta=beta, floor=floor)
    there = rewards.detach().double()
    there = there[~there.isnan()]
    kept = {name: float(state[name]) for name in ("mean", "square", "weight")}
    first = not kept["weight"]
    if len(there):
        now = {"mean": float(there.mean()), "square": float(there.square().mean()), "weight": 1.0}
        kept = {name: beta * kept[name] + (1 - beta) * now[name] for name in kept}
    mean, std = _moments(kept, floor)
    first_mean, first_std = (mean, std) if first else (float(state["first_mean"]), float(state["first_std"]))
    scale = std / first_std if anchored else std
    shift = mean - first_mean * scale if anchored else mean
    return {
        "return_mean": torch.full((len(rewards),), shift, dtype=torch.float64),
        "return_std": torch.full((len(rewards),), scale, dtype=torch.float64),
        "state": {**kept, "first_mean": first_mean, "first_std": first_std},
        "metrics": {"critic/return_mean": mean, "critic/return_std": std},
    }


def _moments(kept: Mapping[str, float], floor: float) -> tuple[float, float]:
    if kept["weight"] == 0:
        return 0.0, 1.0
    mean, square = kept["mean"] / kept["weight"], kept["square"] / kept["weight"]
    return mean, max(max(square - mean * mean, 0.0) ** 0.5, floor)
