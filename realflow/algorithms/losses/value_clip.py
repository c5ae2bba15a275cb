"""The clipped loss of a critic."""

from __future__ import annotations

import torch

from realflow.algorithms.losses.parts import given, masked
from realflow.algorithms.terms import LossTerms
from realflow.graph.builtins import check_options


def value_clip(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float = 0.2,
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
    now = masked(values.roll(1), mask)
    old = given(old_values.roll(1), now, mask)
    target = given(returns, now, mask)
    free = (now - target).square()
    clipped = (old + (now - old).clamp(-clip, clip) - target).square()
    per_token = 0.5 * torch.maximum(free, clipped)
    metrics = {
        "vf_loss": per_token.detach(),
        "vf_clipfrac": (clipped > free).to(now.dtype),
        "vpred_mean": now.detach(),
    }
    return LossTerms(per_token, metrics)
