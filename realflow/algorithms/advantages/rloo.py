"""RLOO's advantage: REINFORCE with the others of the group as the baseline (arXiv 2402.14740)."""

from __future__ import annotations

import torch

from realflow.algorithms.advantages.groups import group_stats


def rloo(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """`R` less the mean of the others in its group: [S].

    Which is `(R - mean) * n / (n - 1)` for a group of n; 0 for a group of one.
    """
    stats = group_stats(rewards, group_ids)
    count = stats.count[stats.inverse]
    return stats.per_sample(stats.deviation * count / (count - 1).clamp(min=1))
