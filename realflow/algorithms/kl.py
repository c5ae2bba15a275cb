"""Estimates of KL(policy || reference) from one sampled token (J. Schulman, "Approximating KL
Divergence", 2020): k1 is unbiased with high variance, k2 biased with low variance, k3 unbiased,
never negative and of low variance."""

from __future__ import annotations

import torch

from realflow.errors import InputError

KINDS = ("k1", "k2", "k3")
LOG_RATIO_LIMIT = 20.0


def bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    """`exp` of a log ratio clamped to ±20, so that no ratio overflows (float32 ends at exp(88)).

    Beyond the limit the gradient is 0: such a token says nothing but that it is far off.
    """
    return torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str = "k3") -> torch.Tensor:
    """KL estimate of each token, of the shape and dtype of `logprobs`.

    k1 is `logp - ref`, k2 is `(logp - ref)^2 / 2`, k3 is `exp(ref - logp) - 1 - (ref - logp)` with
    `ref - logp` clamped to ±20 (in both places: clamped inside `exp` alone, the linear term would
    push a token that the reference likes far better still lower). The result is not clamped.

    Raises InputError for any other kind.
    """
    reference = ref_logprobs.detach().to(logprobs.dtype)
    if kind == "k1":
        return logprobs - reference
    if kind == "k2":
        return 0.5 * (logprobs - reference).square()
    if kind == "k3":
        log_ratio = (reference - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return torch.expm1(log_ratio) - log_ratio  # expm1: exact where the two policies nearly agree
    raise InputError(f"kl: unknown estimate {kind!r}; expected one of {', '.join(KINDS)}")
