"""Group sequence policy optimisation: one ratio for each sequence."""

from __future__ import annotations

import torch

from realflow.algorithms.kl import bounded_exp
from realflow.algorithms.losses.parts import Policy, Regulariser, clipped_objective, sample_sums
from realflow.algorithms.terms import LossTerms
from realflow.data.batch import to_tokens
from realflow.graph.builtins import check_options


def gspo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    ref_logprobs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    entropy: torch.Tensor | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
) -> LossTerms:
    """GSPO (arXiv 2507.18071, equations 5 to 7): PPO's clipped objective with one ratio a sequence,
    `r = exp(mean over its tokens of (logprobs - old_logprobs))`.

    Every token of the sequence has the sequence's value (with advantages that are equal on all of its
    tokens), so that the mean over sequences of token means is the paper's loss: normalise by
    `sequence`. Options and metrics are those of `ppo_clip`. Raises InputError as it does.
    """
    name = "losses.gspo"
    check_options(name, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef)
    more = Regulariser(name, weights, ref_logprobs, entropy, kl_coef, kl, entropy_coef)
    policy = Policy.of(logprobs, old_logprobs, advantages, mask)
    counts = sample_sums(mask, lengths).clamp(min=1)
    mean = sample_sums(policy.logprobs - policy.old, lengths) / counts
    ratio = to_tokens(bounded_exp(mean), lengths).to(policy.logprobs.dtype)
    objective, metrics = clipped_objective(ratio, policy.advantages, clip_low, clip_high)
    return more.terms(objective, policy.logprobs, mask, {**metrics, "ppo_kl": policy.distance})
