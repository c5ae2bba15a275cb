"""LitePPO's advantage (arXiv 2508.08221): the mean of the group, the standard deviation of the batch."""

from __future__ import annotations

import torch

from realflow.algorithms.advantages.groups import group_stats
from realflow.graph.builtins import check_options


def lite_ppo(rewards: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """`(R - mean of the group) / (std of the batch + eps)`: [S].

    The standard deviation is the unbiased one of all rewards of the batch around their own mean, so
    that a group whose rewards nearly agree is not blown up. Raises InputError for a negative `eps`.
    """
    check_options("advantages.lite_ppo", eps=eps)
    stats = group_stats(rewards, group_ids)
    known = rewards.detach().double()[stats.present]
    std = known.std(correction=1) if len(known) > 1 else known.new_zeros(())
    scaled = stats.deviation / (std + eps)
    return stats.per_sample(torch.where(stats.deviation == 0, stats.deviation, scaled))
