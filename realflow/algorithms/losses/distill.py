"""On-policy distillation: the student learns from a teacher on samples of its own, alone or beside RL."""

from __future__ import annotations

import torch

from realflow.algorithms.kl import bounded_exp
from realflow.algorithms.losses.parts import Policy, Regulariser, clipped_objective, given, masked
from realflow.algorithms.terms import LossTerms
from realflow.graph.builtins import check_options


def distill(
    logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    mask: torch.Tensor,
    old_logprobs: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    entropy: torch.Tensor | None = None,
    coef: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    entropy_coef: float = 0.0,
) -> LossTerms:
    """Reverse KL to a teacher on the student's own samples (arXiv 2306.13649): `coef` times
    `w (logprobs - teacher_logprobs)^2 / 2`; with `advantages` joined with RL, PPO's clipped objective
    being added.

    The square's gradient, `(logp - teacher) grad logp`, is in the mean over the student's samples that
    of KL(student || teacher). (The difference itself, which is the KL's value, has a gradient of mean
    zero: nothing would be learnt from it.) `w = exp(logprobs - old_logprobs)`, as a constant, makes the
    mean that of the student's present policy after several optimizer steps; without `old_logprobs`
    the samples are taken to be of it.

    Metrics: `distill_loss` (without `coef`), `reverse_kl` (`logp - teacher`, whose mean estimates the
    KL), with `advantages` those of `ppo_clip`. Raises InputError for options that make no sense.
    """
    name = "losses.distill"
    check_options(name, coef=coef, clip_low=clip_low, clip_high=clip_high)
    more = Regulariser(name, weights, None, entropy, 0.0, "k1", entropy_coef)
    now = masked(logprobs, mask)
    old = now.detach() if old_logprobs is None else given(old_logprobs, now, mask)
    gap = now - given(teacher_logprobs, now, mask)
    distance = 0.5 * bounded_exp(now - old).detach() * gap.square()
    found = {"distill_loss": distance.detach(), "reverse_kl": gap.detach()}
    objective = torch.zeros_like(now)
    if advantages is not None:
        policy = Policy.of(logprobs, old, advantages, mask)
        objective, metrics = clipped_objective(policy.ratio, policy.advantages, clip_low, clip_high)
        found |= {**metrics, "ppo_kl": policy.distance}
    terms = more.terms(objective, now, mask, found)
    return LossTerms(terms.per_token + coef * distance, terms.metrics)
