"""Masks that hang on the whole batch, and are therefore made before a train call reads them."""

from __future__ import annotations

import torch

from realflow.data.batch import to_tokens
from realflow.graph.builtins import check_options


def m2po(
    logprobs: torch.Tensor, prox_logprobs: torch.Tensor, loss_mask: torch.Tensor, *, threshold: float = 0.04
) -> torch.Tensor:
    """The mask of M2PO (arXiv 2510.01161): `loss_mask` without the tokens whose squared log ratio is
    largest, so many that the mean square of the others is under `threshold`. bool [T].

    `logprobs` [T] are those of the policy that drew the tokens, `prox_logprobs` [T] those of the
    policy that is trained, before it is. Tokens with equal squares stay or go together, so that the
    order of samples changes nothing. Raises InputError for a `threshold` that is not above 0.
    """
    check_options("masks.m2po", threshold=threshold)
    mask = loss_mask.bool()
    squares = (logprobs.detach().double() - prox_logprobs.detach().double()).square()
    rising = squares[mask].sort().values
    means = rising.cumsum(0) / torch.arange(1, len(rising) + 1, device=rising.device)
    kept = int((means < threshold).sum())  # means of rising values never fall
    return mask if kept == len(rising) else mask & (squares < rising[kept])


def selected(
    loss_mask: torch.Tensor,
    selected: torch.Tensor,
    rewards: torch.Tensor,
    lengths: torch.Tensor,
    *,
    above: float = 0.0,
) -> torch.Tensor:
    """The tokens of `loss_mask` (bool [T]) in samples that are `selected` (bool [S]) and whose reward
    ([S]) is over `above`: bool [T]. What RAFT (arXiv 2304.06767) is fine-tuned on.

    Samples without a reward (NaN) are left out.
    """
    return loss_mask.bool() & to_tokens(selected.bool() & (rewards > above), lengths)
