"""PPO's clipped objective; DAPO's is the same with `clip_low: 0.2, clip_high: 0.28`."""

from __future__ import annotations

import torch

from realflow.algorithms.losses.parts import Policy, Regulariser, clipped_objective
from realflow.algorithms.terms import LossTerms
from realflow.graph.builtins import check_options


def ppo_clip(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ref_logprobs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    entropy: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
) -> LossTerms:
    """PPO's clipped objective (arXiv 1707.06347), as a loss.

    `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))` with `r = exp(logprobs - old_logprobs)`;
    with `dual_clip` (arXiv 1912.09729) at most `-A dual_clip` where A < 0; times `weights`, where
    there are any. Added to it are `kl_coef` times the KL estimate to `ref_logprobs` and
    `-entropy_coef` times `entropy`. Bounds that differ (0.2, 0.28) are DAPO's (arXiv 2503.14476).

    Metrics: `pg_loss` (the weighted objective alone), `pg_clipfrac` (1 where the clipped branch is
    the larger), `ppo_kl` (`old - logp`), with `dual_clip` also `pg_clipfrac_lower`, with
    `ref_logprobs` also `kl_loss` (not multiplied by its coefficient).

    Raises InputError for options that make no sense, such as a `kl_coef` without `ref_logprobs`.
    """
    name = "losses.ppo_clip"
    check_options(name, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_coef=kl_coef)
    more = Regulariser(name, weights, ref_logprobs, entropy, kl_coef, kl, entropy_coef)
    policy = Policy.of(logprobs, old_logprobs, advantages, mask)
    objective, metrics = clipped_objective(policy.ratio, policy.advantages, clip_low, clip_high, dual_clip)
    return more.terms(objective, policy.logprobs, mask, {**metrics, "ppo_kl": policy.distance})
