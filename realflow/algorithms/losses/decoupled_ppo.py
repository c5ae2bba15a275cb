"""Decoupled PPO: clipped around a recent policy, weighted from the one that drew the samples."""

from __future__ import annotations

import torch

from realflow.algorithms.kl import bounded_exp
from realflow.algorithms.losses.parts import Policy, Regulariser, clipped_objective, given, masked
from realflow.algorithms.terms import LossTerms
from realflow.graph.builtins import check_options


def decoupled_ppo(
    logprobs: torch.Tensor,
    prox_logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ref_logprobs: torch.Tensor | None = None,
    *,
    entropy: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    cap: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
) -> LossTerms:
    """Decoupled PPO (arXiv 2505.24298, equation 5; first in arXiv 2110.00641): PPO's clipped objective
    with the ratio to the proximal policy, times `w = exp(prox_logprobs - behaviour_logprobs)`.

    Tokens whose w is above `cap` are dropped from the sum and stay in the count (their value is 0);
    without a `cap` every weight applies as it is. Other options and metrics are those of `ppo_clip`;
    metrics also: `behaviour_weight` (w, before the cap), `behaviour_dropped` (1 where it is above).
    Raises InputError as `ppo_clip` does.
    """
    name = "losses.decoupled_ppo"
    check_options(name, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, cap=cap, kl_coef=kl_coef)
    policy = Policy.of(logprobs, prox_logprobs, advantages, mask)
    weight = bounded_exp(policy.old - given(behaviour_logprobs, policy.old, mask))
    dropped = torch.zeros_like(mask) if cap is None else weight > cap
    kept = torch.where(dropped, torch.zeros_like(weight), weight)
    more = Regulariser(name, kept, ref_logprobs, entropy, kl_coef, kl, entropy_coef)
    objective, metrics = clipped_objective(policy.ratio, policy.advantages, clip_low, clip_high, dual_clip)
    metrics |= {
        "ppo_kl": policy.distance,
        "behaviour_weight": masked(weight, mask),
        "behaviour_dropped": dropped.to(weight.dtype),
    }
    return more.terms(objective, policy.logprobs, mask, metrics)
