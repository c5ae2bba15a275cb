"""Tokens that samples have in common are computed once.

The samples of a group repeat their prompt, and chat prompts repeat their beginning. Under causal
attention the hidden state of a token depends on the tokens up to it alone, so equal beginnings have
equal states in every layer. Everything but attention is computed for distinct tokens only; around
attention, states are repeated (`Shared.spread`) and one copy is kept (`Shared.keep`). Values and
gradients are those of the whole batch, up to the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch


@dataclass(frozen=True)
class Shared:
    """Which of T packed tokens are distinct (U of them).

    `keep` (int64 [U], rising) are the places of the first copies; `spread` (int64 [T]) says for each
    token which of these it is.
    """

    keep: torch.Tensor
    spread: torch.Tensor

    def repeat(self, distinct: torch.Tensor) -> torch.Tensor:
        """[U, ...] -> [T, ...]. Gradients of copies are added in float32 at least."""
        repeated: torch.Tensor = _Repeat.apply(distinct, self.spread)
        return repeated

    def distinct(self, packed: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [U, ...]: the first copies."""
        return packed.index_select(0, self.keep)


class _Repeat(torch.autograd.Function):
    """Row selection whose backward sums in float32: a prompt's gradient is a sum over all samples of
    its group, which bfloat16 would round at every term."""

    @staticmethod
    def forward(ctx: Any, distinct: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(distinct)
        ctx.save_for_backward(spread)
        return distinct.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (spread,) = ctx.saved_tensors
        wide = grad.dtype if grad.dtype == torch.float64 else torch.float32
        total = grad.new_zeros(ctx.rows, *grad.shape[1:], dtype=wide)
        return total.index_add_(0, spread, grad.to(wide)).to(grad.dtype), None


def find_shared(tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> Shared | None:
    """What each sequence has in common with the beginning of the one before it; None for nothing.

    `tokens` int64 [T] and `cu_seqlens` int32 [S + 1] lie on the CPU. Samples of a group are found
    where they are neighbours, as they are in the order of sample ids.
    """
    spread = torch.arange(len(tokens))
    before: tuple[int, int] | None = None
    repeated = 0
    for start, stop in pairwise(cu_seqlens.tolist()):
        if before is not None:
            size = min(stop - start, before[1] - before[0])
            other = before[0]
            same = tokens[start : start + size] == tokens[other : other + size]
            common = size if bool(same.all()) else int(same.to(torch.int8).argmin())
            spread[start : start + common] = spread[other : other + common]
            repeated += common
        before = (start, stop)
    if not repeated:
        return None
    first = spread == torch.arange(len(tokens))
    number = torch.cumsum(first, 0) - 1
    return Shared(first.nonzero().flatten(), number[spread])
