"""Advantages of samples from the rewards of their group.

All take `rewards` ([S], NaN where a sample has none) and `group_ids` (int64 [S]) and return [S] in
the dtype of `rewards`. Groups are found by id, never by position, and keep their real size: a
sample without a reward counts in no mean and has advantage 0, as has a group of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def grpo(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6, scale: bool = True
) -> torch.Tensor:
    """GRPO (arXiv 2402.03300): `(R - mean) / (std + eps)` in each group, `std` unbiased.

    `scale=False` leaves out the division, which is the advantage of Dr.GRPO.
    """
    stats = _group_stats(rewards, group_ids)
    if not scale:
        return stats.per_sample(stats.deviation)
    squares = stats.sum(stats.deviation.square())
    std = (squares / (stats.count - 1).clamp(min=1)).sqrt()[stats.inverse]
    scaled = stats.deviation / (std + eps)
    # Equal rewards deviate by exactly 0 (see _group_stats), and 0 it stays, with eps = 0 too.
    return stats.per_sample(torch.where(stats.deviation == 0, stats.deviation, scaled))


def dr_grpo(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Dr.GRPO (arXiv 2503.20783): `R - mean` in each group."""
    return grpo(rewards, group_ids, scale=False)


def rloo(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """RLOO (arXiv 2402.14740): `R` less the mean of the others in its group.

    Which is `(R - mean) * n / (n - 1)` for a group of n; 0 for a group of one.
    """
    stats = _group_stats(rewards, group_ids)
    count = stats.count[stats.inverse]
    return stats.per_sample(stats.deviation * count / (count - 1).clamp(min=1))


@dataclass(frozen=True)
class _GroupStats:
    """Of [S] rewards in G groups: `inverse` [S] is the group's place, `count` [G] how many rewards
    it has, `deviation` [S] the distance from its mean (float64, 0 where there is no reward)."""

    inverse: torch.Tensor
    count: torch.Tensor
    deviation: torch.Tensor
    dtype: torch.dtype

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of [S] values over each group: [G]."""
        return torch.zeros_like(self.count).index_add_(0, self.inverse, values)

    def per_sample(self, values: torch.Tensor) -> torch.Tensor:
        """The result, in the caller's dtype."""
        return values.to(self.dtype)


def _group_stats(rewards: torch.Tensor, group_ids: torch.Tensor) -> _GroupStats:
    assert rewards.ndim == 1 and rewards.shape == group_ids.shape, (rewards.shape, group_ids.shape)
    dtype = rewards.dtype if rewards.dtype.is_floating_point else torch.float64
    values = rewards.detach().double()
    present = ~values.isnan()
    distinct, inverse = torch.unique(group_ids, return_inverse=True)
    zeros = values.new_zeros(len(distinct))
    count = zeros.index_add(0, inverse, present.double())
    # Measured from the group's lowest reward, equal rewards are exactly 0 and so is their mean;
    # rounding of the mean itself would be blown up by the division by a tiny std.
    lowest = zeros.scatter_reduce(
        0, inverse, torch.where(present, values, torch.inf), "amin", include_self=False
    )
    shifted = torch.where(present, values - lowest[inverse], 0.0)
    mean = zeros.index_add(0, inverse, shifted) / count.clamp(min=1)
    deviation = torch.where(present, shifted - mean[inverse], 0.0)
    return _GroupStats(inverse, count, deviation, dtype)
