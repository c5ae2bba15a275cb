"""Second-moment trust policy optimisation: no clipping, but a mask without the farthest tokens."""

from __future__ import annotations

import torch

from realflow.algorithms.losses.parts import Policy, Regulariser
from realflow.algorithms.terms import LossTerms
from realflow.graph.builtins import check_options


def m2po(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ref_logprobs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    entropy: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
) -> LossTerms:
    """M2PO (arXiv 2510.01161): `-A r` with `r = exp(logprobs - old_logprobs)`, without clipping.

    `mask` is the one that `realflow.algorithms.masks.m2po` makes: the tokens that are farthest from
    the old policy are not in it. Which these are hangs on the whole batch, so that a loss, which sees
    a part of it, cannot tell. Metrics: `pg_loss`, `ppo_kl`, and `kl_loss` as in `ppo_clip`. Raises
    InputError as it does.
    """
    name = "losses.m2po"
    check_options(name, kl_coef=kl_coef)
    more = Regulariser(name, weights, ref_logprobs, entropy, kl_coef, kl, entropy_coef)
    policy = Policy.of(logprobs, old_logprobs, advantages, mask)
    objective = -policy.advantages * policy.ratio
    return more.terms(objective, policy.logprobs, mask, {"ppo_kl": policy.distance})
