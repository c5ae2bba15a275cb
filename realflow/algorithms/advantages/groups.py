"""Rewards against those of their group: what GRPO and its kin share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from realflow.errors import InputError


@dataclass(frozen=True)
class GroupStats:
    """Of [S] rewards in G groups, in float64: `inverse` [S] is the group's place, `count` [G] how many
    rewards it has, `deviation` [S] the distance from its mean (0 where there is no reward), `present`
    (bool [S]) where there is one. `dtype` is that of the result."""

    inverse: torch.Tensor
    count: torch.Tensor
    deviation: torch.Tensor
    present: torch.Tensor
    dtype: torch.dtype

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of [S] values over each group: [G]."""
        return torch.zeros_like(self.count).index_add_(0, self.inverse, values)

    def per_sample(self, values: torch.Tensor) -> torch.Tensor:
        """The result, in the caller's dtype."""
        return values.to(self.dtype)


def group_stats(rewards: torch.Tensor, group_ids: torch.Tensor) -> GroupStats:
    """What is known of the groups of `rewards` ([S], NaN where there is none).

    Raises InputError where `rewards` and `group_ids` are not two [S] tensors.
    """
    check_samples("rewards", rewards, "group_ids", group_ids)
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
    return GroupStats(inverse, count, deviation, present, result_dtype(rewards))


def result_dtype(rewards: torch.Tensor) -> torch.dtype:
    """That of the rewards; float64 where they are whole numbers."""
    return rewards.dtype if rewards.dtype.is_floating_point else torch.float64


def check_samples(name: str, values: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both have one entry a sample. Raises InputError."""
    if values.ndim != 1 or values.shape != other.shape:
        raise InputError(
            f"{name} and {other_name} have the shapes {tuple(values.shape)} and {tuple(other.shape)}; "
            "expected one entry for each sample in both"
        )
