"""Generalised advantage estimation (arXiv 1506.02438, equation 16) over packed samples."""

from __future__ import annotations

import torch

from realflow.algorithms.advantages.packed import check_packed, chosen_tokens, discounted_sums
from realflow.errors import InputError
from realflow.graph.types import Range
from realflow.kernels import operator

Pair = tuple[torch.Tensor, torch.Tensor]


def gae(
    token_rewards: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: torch.Tensor,
) -> Pair:
    """Advantages and returns of the tokens that a policy chose: two float64 [T], 0 outside of `mask`.

    Packed are `token_rewards` [T] (what followed the choice of a token), `values` [T] (the critic's value
    of the state in which the token was chosen) and `mask` (bool [T], the tokens chosen), of samples
    with `lengths` (int64 [S]). `bootstrap` says what comes after a sample: its value, [S], which is
    0 for a finished one; or a bool [S] that is true where the sample was cut off, and then the value at
    the sample's last token stands for what would have come.

    `d_t = r_t + gamma V_{t+1} - V_t`, `A_t = d_t + gamma lam A_{t+1}`, return `A_t + V_t`, where t counts
    chosen tokens only: others in between (a tool's output) are skipped, so that V_{t+1} is the value of
    the state in which the next choice was made.

    The compiled kernel (csrc/gae.h) does it where it is built for the tensors' device, and
    `gae_in_torch` elsewhere. Raises InputError for gamma or lam outside of [0, 1], and for shapes that
    do not fit.
    """
    for name, option in (("gamma", gamma), ("lam", lam)):
        if option not in Range(0, 1):
            raise InputError(f"advantages.gae: {name} must be {Range(0, 1)}, not {option}")
    check_packed(mask, lengths, token_rewards=token_rewards, values=values)
    rewards, before = token_rewards.detach().double(), values.detach().double()
    after = _after(bootstrap, before, lengths)
    compiled = operator("gae", before.device)
    if compiled is None:
        return gae_in_torch(rewards, before, lengths, mask, gamma=gamma, lam=lam, after=after)
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    bounds[1:] = lengths.cumsum(0)
    chosen = mask.bool().contiguous()
    found: Pair = compiled(rewards.contiguous(), before.contiguous(), chosen, bounds, after, gamma, lam)
    return found


def gae_in_torch(
    token_rewards: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    after: torch.Tensor,
) -> Pair:
    """`gae` in torch alone, of float64 tensors: what the kernel is held to. `after` (float64 [S]) is the
    value of the state that each sample ended in, 0 where nothing follows."""
    places, counts = chosen_tokens(mask, lengths.to(values.device))
    before = values[places]
    following = torch.zeros_like(before)
    following[:-1] = before[1:]
    ends = counts.cumsum(0)[counts > 0] - 1  # each sample's last choice
    following[ends] = after[counts > 0]
    delta = token_rewards[places] + gamma * following - before
    found = discounted_sums(delta, counts, gamma * lam)
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    advantages[places] = found
    returns[places] = found + before
    return advantages, returns


def _after(bootstrap: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The value of the state that each sample ended in, float64 [S] on the device of `values`."""
    if bootstrap.shape != lengths.shape:
        raise InputError(
            f"bootstrap has the shape {tuple(bootstrap.shape)}; expected one entry for each of the "
            f"{len(lengths)} samples"
        )
    given = bootstrap.detach().to(values.device)
    if given.dtype != torch.bool:
        return given.double().contiguous()
    cut = given & (lengths.to(values.device) > 0)
    last = lengths.to(values.device).cumsum(0) - 1
    after = torch.zeros(len(given), dtype=torch.float64, device=values.device)
    after[cut] = values[last[cut]]
    return after
