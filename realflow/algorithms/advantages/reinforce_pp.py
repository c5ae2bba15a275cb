"""REINFORCE++ and its baseline form (arXiv 2501.03262)."""

from __future__ import annotations

import torch

from realflow.algorithms.advantages.groups import check_samples, group_stats
from realflow.algorithms.advantages.packed import at_last, check_packed, returns_to_go
from realflow.algorithms.advantages.whitening import whitened
from realflow.data.batch import to_tokens


def reinforce_pp(
    rewards: torch.Tensor,
    token_rewards: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float = 1.0,
) -> torch.Tensor:
    """REINFORCE++: the return of `R - kl` from each token on, whitened over the batch: float64 [T].

    `rewards` ([S], NaN where a sample has none) stand on the last token that the policy chose,
    `token_rewards` ([T], usually `-coef kl`) on their own. A sample without a reward has advantages 0 and
    counts in no mean.
    """
    check_packed(mask, lengths, token_rewards=token_rewards)
    check_samples("rewards", rewards, "lengths", lengths)
    rewarded = mask.bool() & ~to_tokens(rewards.isnan(), lengths)
    total = token_rewards.detach().double() + at_last(rewards, rewarded, lengths)
    return whitened(returns_to_go(total, rewarded, lengths, gamma), rewarded)


def reinforce_pp_baseline(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    token_rewards: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float = 1.0,
) -> torch.Tensor:
    """REINFORCE++-baseline: as `reinforce_pp`, of rewards less the mean of their group: float64 [T]."""
    stats = group_stats(rewards, group_ids)
    centred = torch.where(stats.present, stats.deviation, torch.nan)
    return reinforce_pp(centred, token_rewards, lengths, mask, gamma=gamma)
