"""Dr.GRPO's advantage (arXiv 2503.20783, section 3.2)."""

from __future__ import annotations

import torch

from realflow.algorithms.advantages.groups import group_stats


def dr_grpo(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """`R - mean` in each group, undivided: [S]."""
    stats = group_stats(rewards, group_ids)
    return stats.per_sample(stats.deviation)
