"""`rewards.overlong`: what a response costs that comes near its longest."""

from __future__ import annotations

import torch

from realflow.graph.builtins import check_options


def overlong(
    loss_mask: torch.Tensor,
    lengths: torch.Tensor,
    *,
    limit: int = 20480,
    buffer: int = 4096,
    factor: float = 1.0,
) -> list[float]:
    """DAPO's soft overlong penalty (arXiv 2503.14476, section 3.4): `min(-(n - (limit - buffer)) / buffer *
    factor, 0)` for a response of `n` tokens: 0 up to `limit - buffer`, then down to `-factor` at `limit`.

    `loss_mask` (bool `[T]`) has the tokens that the policy wrote, `lengths` (int64 `[S]`) the tokens of each
    sample; `limit` is the graph's `max_new_tokens`. Returns a number for each sample, to be added to others
    (`rewards.weighted`). Raises InputError for a buffer below 1 or a negative factor.
    """
    check_options("rewards.overlong", buffer=buffer, factor=factor)
    written = [int(part.sum()) for part in loss_mask.split(lengths.tolist())]
    return [min(-(n - (limit - buffer)) / buffer * factor, 0.0) for n in written]
