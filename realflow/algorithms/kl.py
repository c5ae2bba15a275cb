"""Estimates of KL(policy || reference) from one sampled token (J. Schulman, "Approximating KL
Divergence", 2020): k1 is unbiased with high variance, k2 biased with low variance, k3 unbiased,
never negative and of low variance. And a coefficient of the KL that follows a target."""

from __future__ import annotations

import math

import torch

from realflow.errors import InputError

KINDS = ("k1", "k2", "k3")
LOG_RATIO_LIMIT = 20.0
ADAPTED_BY = 0.2


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


def adapted(coef: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """The coefficient of the KL for the next step (arXiv 1909.08593, section 2.2).

    `coef * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon)`, where `kl` is the mean KL of this
    step's `samples` samples: it grows where the KL is above `target`, over some `horizon` samples. To be
    called once for each step.

    Raises InputError for a KL that is no number, and for a target, horizon or number of samples that
    makes no sense: the coefficient would no longer be positive.
    """
    if not math.isfinite(kl):
        raise InputError(f"adaptive KL: the mean KL is {kl}; expected a finite number")
    if not (coef >= 0 and target > 0 and samples >= 0):
        raise InputError(
            f"adaptive KL: expected a coefficient >= 0, a target above 0 and samples >= 0, found {coef}, "
            f"{target} and {samples}"
        )
    if not horizon > ADAPTED_BY * samples or not horizon > 0:
        raise InputError(
            f"adaptive KL: a horizon of {horizon} samples is too short for steps of {samples}; expected more "
            f"than {ADAPTED_BY:g} of a step (usual are many steps)"
        )
    error = min(max(kl / target - 1, -ADAPTED_BY), ADAPTED_BY)
    return coef * (1 + error * samples / horizon)
