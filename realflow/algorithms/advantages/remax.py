"""ReMax's advantage (arXiv 2310.10505, algorithm 2)."""

from __future__ import annotations

import torch

from realflow.algorithms.advantages.groups import check_samples, result_dtype


def remax(rewards: torch.Tensor, greedy_rewards: torch.Tensor) -> torch.Tensor:
    """`R - R(greedy)`: the reward of a sample less that of the greedy answer to its prompt, [S].

    0 where either is missing (NaN). Raises InputError where the two are not [S] both.
    """
    check_samples("rewards", rewards, "greedy_rewards", greedy_rewards)
    difference = rewards.detach().double() - greedy_rewards.detach().double()
    return torch.where(difference.isnan(), 0.0, difference).to(result_dtype(rewards))
