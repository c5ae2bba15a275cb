"""From logits whose vocabulary is cut over ranks to tokens: `sampling.draw` without gathering logits.

Every rank of a tensor group has the logits of some token ids. What the ranks tell each other is a few
numbers a row: their largest logit and their mass, then the token that the owner of the drawn place
found. Top-k and top-p find the smallest logit that stays by its digits, from the highest on: the
ranks add up histograms of 256 bins, so that a round costs the same for any vocabulary.

All sums over ranks are made in order of rank from gathered numbers, so that every rank of the group
ends with the same tokens and log probabilities, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from realflow.engines.sampling import check_finite, chunked, locate, work_dtype
from realflow.graph.types import Sampling
from realflow.models.place import Axis

_BITS, _BINS = 8, 256


@dataclass(frozen=True)
class Cut:
    """One rank's part of the vocabulary: token ids from `start` on, on the `index`-th rank of a group.

    `gather` stacks the tensors (equal in shape) of all ranks in their order: [...] -> [ranks, ...].
    """

    start: int
    index: int
    gather: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def over(cls, axis: Axis, start: int) -> Cut:
        """The cut over the ranks of a tensor axis."""

        def gather(mine: torch.Tensor) -> torch.Tensor:
            every = mine.new_empty(axis.size * mine.numel())
            dist.all_gather_single(every, mine.reshape(-1), group=axis.group)
            return every.view(axis.size, *mine.shape)

        return cls(start, axis.index, gather)


def draw_cut(
    logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling, cut: Cut
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sampling.draw` for `logits` [B, V of this rank]; `uniforms` float64 [B], the same on all ranks.

    Returns the same global token ids int64 [B] and logprobs [B] on all ranks of the cut. Up to
    rounding they are those of `draw` with the whole vocabulary. Raises RunError, on all ranks, where
    logits are not finite.
    """
    work = work_dtype(logits)
    greedy = sampling.temperature == 0.0
    scaled = logits
    if not greedy and sampling.temperature != 1.0:
        scaled = logits.to(work) / sampling.temperature
    if not greedy:
        scaled = restrict_cut(scaled, sampling.top_k, sampling.top_p, cut)
    masses, top = _masses(scaled, work)
    chunks = masses.sum(-1).double()
    cumulated = chunks.cumsum(-1)
    largest = logits.argmax(-1).double() + cut.start
    tops, totals, tokens = cut.gather(torch.stack([top, cumulated[:, -1], largest], -1)).unbind(-1)
    best = tops.amax(0)
    scale = (tops - best).exp()
    upper = (scale * totals).cumsum(0)
    total = upper[-1]
    check_finite(total)
    if greedy:
        owner = (tops == best).int().argmax(0, keepdim=True)  # the first: the smallest token id
        return tokens.gather(0, owner)[0].long(), total.log().neg().to(work)
    owner, rest = _owner(upper, scale, totals, uniforms)
    rows = (owner == cut.index).nonzero()[:, 0]
    found = logits.new_zeros(len(logits), 2, dtype=torch.float64)
    place = locate(masses[rows], chunks[rows], cumulated[rows], rest[rows, None])
    mass = masses[rows].flatten(1).gather(-1, place).double()[:, 0]
    found[rows, 0] = place[:, 0].double() + cut.start
    found[rows, 1] = mass.log() + (top[rows] - best[rows]) - total[rows].log()
    drawn = cut.gather(found).sum(0)  # all but the owner give zeros
    return drawn[:, 0].long(), drawn[:, 1].to(work)


def restrict_cut(logits: torch.Tensor, top_k: int, top_p: float, cut: Cut) -> torch.Tensor:
    """`sampling.restrict` for the logits of this rank's token ids: [B, V of this rank].

    A `top_k` beyond the vocabulary keeps everything, as 0 does.
    """
    if top_k > 0:
        edge = _edge(logits, torch.ones_like(logits, dtype=torch.float64), float(top_k), cut)
        logits = logits.masked_fill(logits < edge, -torch.inf)
    if top_p < 1.0:
        masses, top = _masses(logits, work_dtype(logits))
        own = torch.stack([top, masses.flatten(1).double().sum(-1)], -1)
        tops, totals = cut.gather(own).unbind(-1)
        scale = (tops - tops.amax(0)).exp()
        share = scale[cut.index] / (scale * totals).sum(0)
        shares = masses.flatten(1)[:, : logits.shape[-1]].double() * share[:, None]
        logits = logits.masked_fill(logits < _edge(logits, shares, top_p, cut), -torch.inf)
    return logits


def _masses(logits: torch.Tensor, work: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(logits - top) in chunks (see `chunked`), and top float64 [B], the largest logit of this rank."""
    top = logits.amax(-1, keepdim=True).to(work)
    at = top.masked_fill(top == -torch.inf, 0.0)  # nothing of this rank is left: its masses are zero
    return chunked(logits.to(work).sub(at).exp_()), top[:, 0].double()


def _owner(
    upper: torch.Tensor, scale: torch.Tensor, totals: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rank's token the number of each row falls on, and the mass before it in that rank's own scale.

    `upper`, `scale` and `totals` are [ranks, B], `upper` the cumulated masses.
    """
    total = upper[-1]
    target = torch.minimum(uniforms.to(total.device) * total, torch.nextafter(total, total.new_zeros(())))
    owner = torch.searchsorted(upper.t().contiguous(), target[:, None], right=True).t()
    factor = scale.gather(0, owner)
    before = upper.gather(0, owner) - factor * totals.gather(0, owner)
    return owner[0], ((target - before).clamp_(min=0) / factor)[0]


def _edge(logits: torch.Tensor, weights: torch.Tensor, wanted: float, cut: Cut) -> torch.Tensor:
    """The largest logit such that all logits at or above it, of all ranks, weigh at least `wanted`: [B, 1].

    Where everything weighs less, the smallest logit that has a weight. A radix selection: the
    numbers' bits, made to sort as integers do, are found eight at a time.
    """
    keys, width = _sortable(logits + 0.0)  # -0.0 and 0.0 are one value
    above = weights.new_zeros(len(logits), 1)
    prefix = keys.new_zeros(len(logits), 1)
    for shift in range(width - _BITS, -1, -_BITS):
        digits = keys >> shift
        inside = (digits >> _BITS) == prefix if shift < width - _BITS else None
        digits = digits & (_BINS - 1) if inside is not None else digits + _BINS // 2
        counted = weights if inside is None else weights * inside
        own = weights.new_zeros(len(logits), _BINS).scatter_add_(1, digits, counted)
        bins = cut.gather(own).sum(0).flip(-1)  # the largest digits first
        reached = above + bins.cumsum(-1)
        last = (bins > 0).long().mul(torch.arange(1, _BINS + 1, device=bins.device)).argmax(-1, keepdim=True)
        place = torch.minimum((reached < wanted).sum(-1, keepdim=True), last)
        above = (reached - bins).gather(-1, place)
        digit = _BINS - 1 - place
        prefix = digit - _BINS // 2 if inside is None else (prefix << _BITS) | digit
    return _from_sortable(prefix, logits.dtype)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sortable(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Integers (as int64) in the order of the floating-point values, and how many bits they have."""
    width = 8 * values.element_size()
    bits = values.view(_INTEGERS[values.element_size()]).long()
    return bits ^ ((bits >> 63) & ((1 << (width - 1)) - 1)), width


def _from_sortable(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of `_sortable`'s integers."""
    bits = keys ^ ((keys >> 63) & ((1 << (8 * dtype.itemsize - 1)) - 1))
    return bits.to(_INTEGERS[dtype.itemsize]).view(dtype)
