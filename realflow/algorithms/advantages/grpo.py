"""GRPO's advantage (DeepSeekMath, arXiv 2402.03300, section 4.1)."""

from __future__ import annotations

import torch

from realflow.algorithms.advantages.groups import group_stats
from realflow.graph.builtins import check_options


def grpo(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6, scale: bool = True
) -> torch.Tensor:
    """`(R - mean) / (std + eps)` in each group, `std` unbiased: [S].

    `scale=False` leaves out the division, which is the advantage of Dr.GRPO. Raises InputError for a
    negative `eps`.
    """
    check_options("advantages.grpo", eps=eps)
    stats = group_stats(rewards, group_ids)
    if not scale:
        return stats.per_sample(stats.deviation)
    squares = stats.sum(stats.deviation.square())
    std = (squares / (stats.count - 1).clamp(min=1)).sqrt()[stats.inverse]
    scaled = stats.deviation / (std + eps)
    # Equal rewards deviate by exactly 0 (see group_stats), and 0 it stays, with eps = 0 too.
    return stats.per_sample(torch.where(stats.deviation == 0, stats.deviation, scaled))
