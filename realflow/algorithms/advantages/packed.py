"""Tokens of packed samples: which of them the policy chose, and sums from each one to its sample's end."""

from __future__ import annotations

import torch

from realflow.errors import InputError


def check_packed(mask: torch.Tensor, lengths: torch.Tensor, **fields: torch.Tensor) -> None:
    """`fields` and `mask` are [T], `lengths` (int64 [S], none negative) adds up to T. Raises InputError."""
    total = int(lengths.sum())
    for name, field in {"mask": mask, **fields}.items():
        if field.shape != (total,):
            raise InputError(
                f"{name} has the shape {tuple(field.shape)}, but the lengths of the samples add up to "
                f"{total}; expected one entry for each token, the samples one after the other"
            )
    if lengths.ndim != 1 or (lengths < 0).any():
        raise InputError("lengths must be one number >= 0 for each sample")


def chosen_tokens(mask: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of `mask` in the packed batch (int64, rising) and how many each sample has (int64 [S])."""
    places = mask.bool().nonzero().flatten()
    samples = torch.arange(len(lengths), device=lengths.device)
    owner = torch.repeat_interleave(samples, lengths)
    return places, torch.bincount(owner[places], minlength=len(lengths))


def at_last(rewards: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`rewards` [S] on the last token of each sample that is in `mask`, 0 elsewhere: float64 [T].

    The reward of a sample without such a token is nowhere.
    """
    places, counts = chosen_tokens(mask, lengths)
    placed = torch.zeros(len(mask), dtype=torch.float64, device=mask.device)
    ends = places[counts.cumsum(0)[counts > 0] - 1]
    placed[ends] = rewards.detach().double()[counts > 0]
    return placed


def returns_to_go(
    token_rewards: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, gamma: float
) -> torch.Tensor:
    """`G_t = r_t + gamma G_{t+1}` over the tokens of `mask` in each sample, 0 elsewhere: float64 [T]."""
    places, counts = chosen_tokens(mask, lengths)
    wide = token_rewards.detach().double()
    sums = torch.zeros_like(wide)
    sums[places] = discounted_sums(wide[places], counts, gamma)
    return sums


def discounted_sums(values: torch.Tensor, counts: torch.Tensor, factor: float) -> torch.Tensor:
    """`s_t = values_t + factor s_{t+1}` within each sample: packed like `values`, [R].

    All samples go backwards together, from their last entries; one that has run out drops out.
    """
    sums = values.clone()
    ends = counts.cumsum(0) - 1
    for back in range(1, int(counts.max()) if len(counts) else 0):
        here = (ends - back)[counts > back]
        sums[here] += factor * sums[here + 1]
    return sums
