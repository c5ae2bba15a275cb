"""What the losses of policies share: masking, the clipped objective, and what is added to an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from realflow.algorithms.kl import bounded_exp, kl_estimate
from realflow.algorithms.terms import LossTerms
from realflow.errors import InputError


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` where `mask` is true, else 0. What stands elsewhere, NaN too, has no part in gradients."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def given(values: torch.Tensor, like: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A field as a constant: without gradient, in the dtype of `like`, 0 where masked."""
    return masked(values.detach().to(like.dtype), mask)


@dataclass(frozen=True)
class Policy:
    """What a loss of a policy computes with, [T] each and 0 where masked: the log probabilities now (with
    gradient), those of the policy that its ratio is to, the advantages, and the ratio."""

    logprobs: torch.Tensor
    old: torch.Tensor
    advantages: torch.Tensor

    @classmethod
    def of(
        cls,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
    ) -> Policy:
        """From what a loss is given."""
        now = masked(logprobs, mask)
        return cls(now, given(old_logprobs, now, mask), given(advantages, now, mask))

    @property
    def ratio(self) -> torch.Tensor:
        """`exp(logprobs - old)`, the log ratio clamped to ±20."""
        return bounded_exp(self.logprobs - self.old)

    @property
    def distance(self) -> torch.Tensor:
        """The metric `ppo_kl`: the k1 estimate of KL(old || now)."""
        return (self.old - self.logprobs).detach()


def clipped_objective(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, with `dual_clip` at most `-A dual_clip` where
    A < 0; and its metrics `pg_clipfrac` (1 where the clipped branch is the larger) and, with `dual_clip`,
    `pg_clipfrac_lower`."""
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = torch.maximum(free, clipped)
    metrics = {"pg_clipfrac": (clipped > free).to(ratio.dtype)}
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        lowered = (advantages < 0) & (objective > ceiling)
        objective = torch.where(lowered, ceiling, objective)
        metrics["pg_clipfrac_lower"] = lowered.to(ratio.dtype)
    return objective, metrics


@dataclass(frozen=True)
class Regulariser:
    """What may be added to any policy's objective: `kl_coef` times the KL estimate `kl` to
    `ref_logprobs`, less `entropy_coef` times `entropy`; and `weights`, which the objective alone is
    multiplied with (such as importance weights). Fields are [T] or None.

    Raises InputError, which names the loss `name`, for a coefficient whose field is not there.
    """

    name: str
    weights: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    entropy: torch.Tensor | None
    kl_coef: float
    kl: str
    entropy_coef: float

    def __post_init__(self) -> None:
        if self.kl_coef and self.ref_logprobs is None:
            raise InputError(
                f"{self.name}: kl_coef is {self.kl_coef}, but there are no ref_logprobs; add an infer call "
                "that writes them, or set kl_coef to 0"
            )
        if self.entropy_coef and self.entropy is None:
            raise InputError(f"{self.name}: entropy_coef is {self.entropy_coef}, but no entropy was given")

    def terms(
        self,
        objective: torch.Tensor,
        logprobs: torch.Tensor,
        mask: torch.Tensor,
        metrics: Mapping[str, torch.Tensor],
    ) -> LossTerms:
        """The loss of an `objective` ([T], to be made small), and its `metrics` joined by `pg_loss` (the
        weighted objective) and, with `ref_logprobs`, `kl_loss` (not multiplied by its coefficient)."""
        if self.weights is not None:
            objective = objective * given(self.weights, objective, mask)
        found = {**metrics, "pg_loss": objective.detach()}
        total = objective
        if self.ref_logprobs is not None:
            distance = kl_estimate(logprobs, given(self.ref_logprobs, logprobs, mask), self.kl)
            found["kl_loss"] = distance.detach()
            if self.kl_coef:
                total = total + self.kl_coef * distance
        if self.entropy_coef and self.entropy is not None:
            total = total - self.entropy_coef * masked(self.entropy, mask)
        return LossTerms(total, found)


def sample_sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums of [T] values over each sample's tokens: [S] in float64."""
    samples = torch.arange(len(lengths), device=values.device)
    owner = torch.repeat_interleave(samples, lengths.to(values.device))
    zeros = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
    return zeros.index_add(0, owner, values.double())
