"""PPO without a critic, as AReaL v0.1 trains reasoning models: right or wrong, nothing else."""

from __future__ import annotations

import torch

from realflow.algorithms.advantages.gae import gae
from realflow.algorithms.advantages.groups import check_samples
from realflow.algorithms.advantages.packed import at_last, check_packed
from realflow.algorithms.advantages.whitening import whitened
from realflow.data.batch import to_tokens


def critic_free(
    rewards: torch.Tensor,
    token_rewards: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    *,
    bonus: float = 5.0,
    solved: float = 0.5,
) -> torch.Tensor:
    """GAE with gamma = lam = 1 and values 0, normalised over the batch: float64 [T].

    A sample whose reward is above `solved` gets `bonus` on the last token that the policy chose, any
    other `-bonus`; `token_rewards` ([T], usually `-coef kl`) come in addition. A sample without a reward
    (NaN) has advantages 0 and counts in no mean.
    """
    check_packed(mask, lengths, token_rewards=token_rewards)
    check_samples("rewards", rewards, "lengths", lengths)
    rewarded = mask.bool() & ~to_tokens(rewards.isnan(), lengths)
    signed = torch.where(rewards > solved, bonus, -bonus)
    total = token_rewards.detach().double() + at_last(signed, rewarded, lengths)
    finished = torch.zeros(len(lengths), dtype=torch.bool, device=lengths.device)
    nothing = torch.zeros_like(total)
    advantages, _ = gae(total, nothing, lengths, rewarded, gamma=1.0, lam=1.0, bootstrap=finished)
    return whitened(advantages, rewarded)
