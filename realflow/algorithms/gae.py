"""Generalised advantage estimation (arXiv 1506.02438) over packed samples."""

from __future__ import annotations

import torch

from realflow.graph.builtins import check_options


def packed_gae(
    token_rewards: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns of the tokens that a policy chose: two float64 [T].

    Packed are `token_rewards` [T] (what followed the choice of a token), `values` [T] (entry i: the
    critic's value of the state after token i) and `mask` (bool [T], the tokens chosen), of samples
    with `lengths` (int64 [S]). Where `bootstrap` (bool [S]) is true the sample was cut off, and the
    critic's value at its last token stands for what would have come; else nothing comes.

    `d_t = r_t + gamma V_{t+1} - V_t`, `A_t = d_t + gamma lam A_{t+1}`, return `A_t + V_t`, where t
    counts chosen tokens only: others in between (a tool's output) are skipped, so that V_{t+1} is
    the value of the state in which the next choice was made. Everything else is 0; a sample's first
    token, which follows no state, is never taken as chosen. Raises InputError for gamma or lam
    outside [0, 1].
    """
    check_options("advantages.gae", gamma=gamma, lam=lam)
    places, counts = chosen_tokens(mask, lengths)
    wide = values.detach().double()
    before = wide[places - 1]
    after = torch.zeros_like(before)
    after[:-1] = before[1:]
    ends = counts.cumsum(0)[counts > 0] - 1  # each sample's last choice
    last = lengths.cumsum(0)[counts > 0] - 1  # and its last token
    after[ends] = torch.where(bootstrap[counts > 0], wide[last], 0.0)
    delta = token_rewards.detach().double()[places] + gamma * after - before
    found = _discounted_sums(delta, counts, gamma * lam)
    advantages, returns = torch.zeros_like(wide), torch.zeros_like(wide)
    advantages[places] = found
    returns[places] = found + before
    return advantages, returns


def chosen_tokens(mask: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of a policy's tokens in the packed batch (int64, rising; never a sample's first
    token) and how many each sample has (int64 [S])."""
    starts = lengths.cumsum(0) - lengths
    chosen = mask.bool().clone()
    chosen[starts[lengths > 0]] = False
    places = chosen.nonzero().flatten()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return places, torch.bincount(owner[places], minlength=len(lengths))


def _discounted_sums(values: torch.Tensor, counts: torch.Tensor, factor: float) -> torch.Tensor:
    """`s_t = values_t + factor s_{t+1}` within each sample: packed like `values`, [R].

    All samples go backwards together, from their last entries; one that has run out drops out.
    """
    sums = values.clone()
    ends = counts.cumsum(0) - 1
    for back in range(1, int(counts.max()) if len(counts) else 0):
        here = (ends - back)[counts > back]
        sums[here] += factor * sums[here + 1]
    return sums
