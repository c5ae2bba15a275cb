"""Soft adaptive policy optimisation: a smooth gate in place of clipping."""

from __future__ import annotations

import torch

from realflow.algorithms.losses.parts import Policy, Regulariser
from realflow.algorithms.terms import LossTerms
from realflow.graph.builtins import check_options


def sapo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ref_logprobs: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    entropy: torch.Tensor | None = None,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
) -> LossTerms:
    """SAPO (arXiv 2511.20347): `-(4 / t) sigmoid(t (r - 1)) A` with `r = exp(logprobs - old_logprobs)`
    and `t` `tau_positive` where A > 0, `tau_negative` elsewhere.

    At r = 1 its gradient is that of `-A r`; it fades as r leaves 1 on either side, the faster the larger
    t. Metrics: `pg_loss`, `ppo_kl`, and `kl_loss` as in `ppo_clip`. Raises InputError as it does.
    """
    name = "losses.sapo"
    check_options(name, tau_positive=tau_positive, tau_negative=tau_negative, kl_coef=kl_coef)
    more = Regulariser(name, weights, ref_logprobs, entropy, kl_coef, kl, entropy_coef)
    policy = Policy.of(logprobs, old_logprobs, advantages, mask)
    ratio = policy.ratio
    tau = torch.where(policy.advantages > 0, ratio.new_tensor(tau_positive), ratio.new_tensor(tau_negative))
    objective = -(4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0)) * policy.advantages
    return more.terms(objective, policy.logprobs, mask, {"ppo_kl": policy.distance})
