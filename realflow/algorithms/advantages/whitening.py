"""Whitening: mean 0 and variance 1 over the tokens of a batch that count."""

from __future__ import annotations

import torch


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` [T] less their mean, over their unbiased standard deviation, both over `mask` (bool [T]).

    Elsewhere exactly 0. Of fewer than two values neither is known, and they stay as they are; equal ones
    become 0. float64 inside, the dtype of `values` outside.
    """
    wide, chosen = values.detach().double(), mask.bool()
    kept = wide[chosen]
    if len(kept) > 1:
        # Measured from one of them, equal values are exactly 0, whatever rounding does to their mean.
        shifted = kept - kept[0]
        deviation = shifted - shifted.mean()
        kept = deviation * (deviation.square().sum() / (len(kept) - 1) + 1e-8).rsqrt()
    result = torch.zeros_like(wide)
    result[chosen] = kept
    return result.to(values.dtype)
