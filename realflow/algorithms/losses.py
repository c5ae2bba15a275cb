"""Losses: a value for each token. The engine masks, weighs and sums them.

Arguments are packed and aligned with `tokens` ([T]; entry i speaks of `tokens[i]`); a field of
samples, such as `advantages`, comes repeated over the sample's tokens. Values at masked tokens are
finite but mean nothing.
"""

from __future__ import annotations

import torch

from realflow.algorithms.kl import bounded_exp, kl_estimate
from realflow.algorithms.terms import LossTerms
from realflow.errors import InputError
from realflow.graph.builtins import check_options


def ppo_clip(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    ref_logprobs: torch.Tensor | None = None,
    *,
    entropy: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
) -> LossTerms:
    """PPO's clipped objective (arXiv 1707.06347), as a loss.

    `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))` with `r = exp(logprobs - old_logprobs)`;
    with `dual_clip` (arXiv 1912.09729) at most `-A dual_clip` where A < 0. Added to it are
    `kl_coef` times the KL estimate to `ref_logprobs` and `-entropy_coef` times `entropy`.

    Metrics: `pg_loss` (the clipped objective alone), `pg_clipfrac` (1 where the clipped branch is
    the larger), `ppo_kl` (`old - logp`), with `dual_clip` also `pg_clipfrac_lower`, with
    `ref_logprobs` also `kl_loss` (not multiplied by its coefficient).

    Raises InputError for options that make no sense, such as a `kl_coef` without `ref_logprobs`.
    """
    check_options(
        "losses.ppo_clip", clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_coef=kl_coef
    )
    if kl_coef and ref_logprobs is None:
        raise InputError(
            f"losses.ppo_clip: kl_coef is {kl_coef}, but there are no ref_logprobs; add an infer call "
            "that writes them, or set kl_coef to 0"
        )
    old = old_logprobs.detach().to(logprobs.dtype)
    advantage = advantages.detach().to(logprobs.dtype)
    log_ratio = logprobs - old
    ratio = bounded_exp(log_ratio)
    free = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    per_token = torch.maximum(free, clipped)
    metrics = {
        "pg_clipfrac": (clipped > free).to(logprobs.dtype),
        "ppo_kl": -log_ratio.detach(),
    }
    if dual_clip is not None:
        ceiling = -advantage * dual_clip
        lowered = (advantage < 0) & (per_token > ceiling)
        per_token = torch.where(lowered, ceiling, per_token)
        metrics["pg_clipfrac_lower"] = lowered.to(logprobs.dtype)
    metrics["pg_loss"] = per_token.detach()
    if ref_logprobs is not None:
        distance = kl_estimate(logprobs, ref_logprobs, kl)
        metrics["kl_loss"] = distance.detach()
        if kl_coef:
            per_token = per_token + kl_coef * distance
    if entropy_coef:
        per_token = per_token - entropy_coef * entropy
    return LossTerms(per_token, metrics)


def sft(logprobs: torch.Tensor) -> LossTerms:
    """Supervised fine-tuning: the cross entropy `-logprobs` of each token."""
    return LossTerms(-logprobs)


def value_clip(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float = 0.2
) -> LossTerms:
    """PPO's clipped value loss: `max((v - R)^2, (old + clamp(v - old, -clip, clip) - R)^2) / 2`.

    `values` (the critic now) and `old_values` (when the returns were made) are the critic's numbers
    at each token; `returns` at entry i are those of choosing token i, so that v is the value of the
    state before, entry i - 1. (A sample's first token follows no state; it is never a loss token.) A
    large `clip` turns clipping off.

    Metrics: `vf_loss`, `vf_clipfrac` (1 where the clipped branch is the larger), `vpred_mean`.
    Raises InputError for a `clip` that is not above 0.
    """
    check_options("losses.value_clip", clip=clip)
    now = values.roll(1)
    old = old_values.detach().to(values.dtype).roll(1)
    target = returns.detach().to(values.dtype)
    free = (now - target).square()
    clipped = (old + (now - old).clamp(-clip, clip) - target).square()
    per_token = 0.5 * torch.maximum(free, clipped)
    metrics = {
        "vf_loss": per_token.detach(),
        "vf_clipfrac": (clipped > free).to(values.dtype),
        "vpred_mean": now.detach(),
    }
    return LossTerms(per_token, metrics)


def aggregate(
    per_token: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, mode: str = "token"
) -> torch.Tensor:
    """The loss of one minibatch (a scalar), as the engine computes it over ranks and micro-batches.

    `token`: the mean over the tokens of `mask` (bool [T]). `sequence`: the mean over sequences
    (`lengths`, int64 [S]) of the mean over their own tokens; a sequence without any is left out.
    The reference that tests hold the engine to; 0 where nothing is left.
    """
    kept = torch.where(mask, per_token, 0.0)
    if mode == "token":
        return kept.sum() / mask.sum().clamp(min=1)
    if mode != "sequence":
        raise InputError(f"normalise: {mode!r} is unknown; expected token or sequence")
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    counts = torch.zeros(len(lengths), dtype=torch.int64).index_add(0, owner, mask.long())
    sums = kept.new_zeros(len(lengths)).index_add(0, owner, kept)
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
