"""Advantages: of samples from the rewards of their group, and of tokens from a critic's values.

`grpo`, `dr_grpo` and `rloo` take `rewards` ([S], NaN where a sample has none) and `group_ids` (int64
[S]) and return [S] in the dtype of `rewards`. Groups are found by id, never by position, and keep
their real size: a sample without a reward counts in no mean and has advantage 0, as has a group of
one. `gae` gives an advantage to each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from realflow.algorithms.gae import chosen_tokens, packed_gae
from realflow.algorithms.kl import kl_estimate
from realflow.data.batch import to_tokens
from realflow.errors import InputError
from realflow.graph.builtins import check_options


def grpo(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6, scale: bool = True
) -> torch.Tensor:
    """GRPO (arXiv 2402.03300): `(R - mean) / (std + eps)` in each group, `std` unbiased.

    `scale=False` leaves out the division, which is the advantage of Dr.GRPO.
    """
    check_options("advantages.grpo", eps=eps)
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


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    finish_reason: Sequence[str],
    lengths: torch.Tensor,
    token_rewards: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_coef: float = 0.0,
    kl: Literal["k1", "k2", "k3"] = "k1",
    whiten: bool = True,
) -> dict[str, torch.Tensor]:
    """Generalised advantage estimation (see `packed_gae`): `advantages` and `returns`, [T] in the dtype
    of `values`, 0 at tokens that the policy did not choose.

    A token's reward is `token_rewards` where there are any, less `kl_coef` times the KL estimate of
    (`logprobs`, `ref_logprobs`); the sample's `rewards` are added at its last chosen token. A sample
    whose `finish_reason` is not `stop` was cut off and bootstraps from the critic. `whiten` makes the
    advantages of the batch's chosen tokens mean 0 and (unbiased) variance 1, after the returns
    have been taken.

    A sample without a reward (NaN) has advantages 0 and the critic's own values as returns: nobody
    learns from it, and it counts in no mean. Raises InputError for options that make no sense.
    """
    check_options("advantages.gae", kl_coef=kl_coef)
    missing = rewards.isnan()
    mask = loss_mask.bool() & ~to_tokens(missing, lengths)
    places, counts = chosen_tokens(mask, lengths)
    total = torch.zeros(len(values), dtype=torch.float64)
    if token_rewards is not None:
        total += token_rewards.detach().double()
    if kl_coef:
        total -= kl_coef * _kl(logprobs, ref_logprobs, kl, kl_coef)
    ends = places[counts.cumsum(0)[counts > 0] - 1]
    total[ends] += rewards.detach().double()[counts > 0]
    cut = torch.tensor([reason != "stop" for reason in finish_reason], dtype=torch.bool)
    advantages, returns = packed_gae(total, values, lengths, mask, gamma=gamma, lam=lam, bootstrap=cut)
    if whiten:
        advantages[places] = _whitened(advantages[places])
    skipped, _ = chosen_tokens(loss_mask.bool() & to_tokens(missing, lengths), lengths)
    returns[skipped] = values.detach().double()[skipped - 1]
    return {"advantages": advantages.to(values.dtype), "returns": returns.to(values.dtype)}


def _kl(
    logprobs: torch.Tensor | None, ref_logprobs: torch.Tensor | None, kind: str, kl_coef: float
) -> torch.Tensor:
    """KL estimate of each token, float64 [T]; both fields must be there."""
    if logprobs is None or ref_logprobs is None:
        raise InputError(
            f"advantages.gae: kl_coef is {kl_coef}, but there are no "
            f"{'logprobs' if logprobs is None else 'ref_logprobs'}; add a call that writes them, or set "
            "kl_coef to 0"
        )
    return kl_estimate(logprobs.detach().double(), ref_logprobs, kind)


def _whitened(values: torch.Tensor) -> torch.Tensor:
    """Values [R] less their mean, over their unbiased standard deviation; of fewer than two nothing is
    known of either, and they stay as they are. Equal ones become 0."""
    if len(values) < 2:
        return values
    deviation = values - values.mean()
    return deviation * (values.var(correction=1) + 1e-8).rsqrt()


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
