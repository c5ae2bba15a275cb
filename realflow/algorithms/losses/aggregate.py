"""From values of tokens to the loss of a minibatch: the reference that tests hold the engine to."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from realflow.algorithms.losses.parts import masked, sample_sums
from realflow.errors import InputError


def aggregate(
    per_token: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    mode: str | Mapping[str, float] = "token",
) -> torch.Tensor:
    """The loss of one minibatch (a scalar), as the engine computes it over ranks and micro-batches.

    `token`: the mean over the tokens of `mask` (bool [T]). `sequence`: the mean over sequences
    (`lengths`, int64 [S]) of the mean over their own tokens. `{"constant": n}` (Dr.GRPO, arXiv
    2503.20783): the mean over sequences of the sum over their tokens, divided by n. A sequence without
    tokens in the mask is left out; 0 where nothing is left. Raises InputError for any other mode.
    """
    kept = masked(per_token, mask)
    if mode == "token":
        return kept.sum() / mask.sum().clamp(min=1)
    counts, sums = sample_sums(mask, lengths), sample_sums(kept, lengths)
    sequences = (counts > 0).sum().clamp(min=1)
    if mode == "sequence":
        return ((sums / counts.clamp(min=1)).sum() / sequences).to(per_token.dtype)
    if isinstance(mode, Mapping) and mode.keys() == {"constant"} and mode["constant"] > 0:
        return (sums.sum() / (mode["constant"] * sequences)).to(per_token.dtype)
    raise InputError(f"normalise: {mode!r} is unknown; expected token, sequence or {{constant: n}}")
