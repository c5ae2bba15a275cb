"""CISPO: the importance weight is clipped, not the objective, so that every token keeps its gradient."""

from __future__ import annotations

import torch

from realflow.algorithms.losses.parts import Policy, Regulariser
from realflow.algorithms.terms import LossTerms
from realflow.graph.builtins import check_options


def cispo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ref_logprobs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    entropy: torch.Tensor | None = None,
    clip_low: float = 1.0,
    clip_high: float = 0.28,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
) -> LossTerms:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equation 4):
    `-stopgrad(clip(r, 1 - clip_low, 1 + clip_high)) A logprobs` with `r = exp(logprobs - old_logprobs)`.

    The paper sets no lower bound, which is `clip_low` 1. Metrics: `pg_loss`, `pg_clipfrac` (1 where
    the weight is clipped), `ppo_kl`, and `kl_loss` as in `ppo_clip`. Raises InputError as it does.
    """
    name = "losses.cispo"
    check_options(name, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef)
    more = Regulariser(name, weights, ref_logprobs, entropy, kl_coef, kl, entropy_coef)
    policy = Policy.of(logprobs, old_logprobs, advantages, mask)
    ratio = policy.ratio.detach()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = -weight * policy.advantages * policy.logprobs
    metrics = {"pg_clipfrac": (weight != ratio).to(ratio.dtype), "ppo_kl": policy.distance}
    return more.terms(objective, policy.logprobs, mask, metrics)
