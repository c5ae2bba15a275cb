"""Log probabilities of given tokens, with their gradient, without full float32 logits.

For hidden rows h and head weight W: z = (W h) / temperature, logp = z[t] - log sum exp z, and the
entropy H = log sum exp z - sum p z with p = softmax(z). Backward (g, e: gradients of logp, H):

    dL/dz = g (onehot(t) - p) - e p (log p + H)

Rows are worked through in blocks that stay in the cache. The raw logits of a block, in the compute
dtype, are kept for the backward pass while they fit in `keep_bytes` altogether, and are recomputed
otherwise; both give the same numbers.

With a head cut along the vocabulary each rank has some rows of W, so some logits: their maximum m,
s = sum exp(z - m), w = sum exp(z - m) z and the target's logit, where it is the rank's own. Two
all-reduces join them, of the maxima [R] and of the (rescaled) sums [3, R]; logits stay where they are.
Backward needs no collective: each rank has its logits' gradient, and so its part of that of h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from realflow.models.place import Axis

KEEP_BYTES = 256 * 2**20
"""Default limit of the logits kept for backward."""

PRODUCT_ROWS = 256
"""Rows of one matrix product of the head."""

BLOCK_ELEMENTS = 2**20
"""Logits worked on at once in float32: 4 MiB, about a CPU core's cache."""


@dataclass(frozen=True)
class Vocabulary:
    """A cut vocabulary: this rank's rows of the head are those of the token ids from `start` on, the
    other ranks of `axis` have the others."""

    axis: Axis
    start: int

    def local(self, targets: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `targets` (int64): their places among this rank's `size` ids (0 for others), and which of them
        are its own."""
        places = targets - self.start
        own = (places >= 0) & (places < size)
        return places.masked_fill(~own, 0), own


class TokenStats(NamedTuple):
    """[R] each, float32 (float64 for float64 models)."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


def token_stats(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocabulary: Vocabulary | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> TokenStats:
    """Log probabilities of `targets` (int64 [R]) and entropies of the distributions at `rows`.

    `rows` [R, H] and `weight` [V, H] are in the compute dtype; both results are differentiable in
    them. `temperature` divides the logits and must be positive (greedy tokens have no
    distribution of their own: they are scored at temperature 1). With `vocabulary` the weight has
    this rank's rows only; all its ranks call together with the same rows and get the same results, and
    the gradient of `rows` is this rank's part of a sum (`CausalModel.run` adds the parts).
    """
    assert temperature > 0, temperature
    return TokenStats(*_TokenStats.apply(rows, weight, targets, temperature, vocabulary, keep_bytes))


@torch.no_grad()
def token_logprobs(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocabulary: Vocabulary | None = None,
) -> torch.Tensor:
    """The log probabilities of `token_stats`, bit for bit, without entropies and without gradients."""
    assert temperature > 0, temperature
    places, own = _owned(targets, weight, vocabulary)
    sums = _Sums.empty(rows)
    for start in range(0, len(rows), PRODUCT_ROWS):
        part = slice(start, min(start + PRODUCT_ROWS, len(rows)))
        logits = torch.mm(rows[part], weight.t())
        for block in _blocks(part, len(weight)):
            z = logits[block.start - start : block.stop - start].to(sums.top.dtype, copy=True)
            sums.fill(block, z, places[block], temperature, entropy=False)
    sums.join(vocabulary, own)
    return sums.target - sums.norm()


class _Sums(NamedTuple):
    """What is added up over the vocabulary for each row, [R] each: the target's logit, the maximum,
    and with e = exp(logit - maximum) the sums of e and of e times the logit."""

    target: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor
    moment: torch.Tensor

    @classmethod
    def empty(cls, rows: torch.Tensor) -> _Sums:
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return cls(*(rows.new_zeros(len(rows), dtype=wide) for _ in range(4)))

    def fill(
        self, block: slice, z: torch.Tensor, places: torch.Tensor, temperature: float, *, entropy: bool
    ) -> None:
        """From a block of raw logits, which is scaled in place."""
        if temperature != 1.0:
            z.div_(temperature)
        top = z.amax(1)
        weights = torch.sub(z, top[:, None]).exp_()
        self.target[block], self.top[block] = z.gather(1, places[:, None])[:, 0], top
        self.total[block] = weights.sum(1)
        if entropy:
            self.moment[block] = torch.linalg.vecdot(weights, z)

    def join(self, vocabulary: Vocabulary | None, own: torch.Tensor | None) -> None:
        """Make them those of the whole vocabulary."""
        if vocabulary is None or own is None:
            return
        local = self.top.clone()
        dist.all_reduce(self.top, dist.ReduceOp.MAX, group=vocabulary.axis.group)
        scale = (local - self.top).exp_()
        sums = torch.stack([self.target * own, self.total * scale, self.moment * scale])
        dist.all_reduce(sums, group=vocabulary.axis.group)
        for mine, whole in zip((self.target, self.total, self.moment), sums, strict=True):
            mine.copy_(whole)

    def norm(self) -> torch.Tensor:
        """log sum exp of the logits."""
        return self.top + self.total.log()


def _owned(
    targets: torch.Tensor, weight: torch.Tensor, vocabulary: Vocabulary | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (targets, None) if vocabulary is None else vocabulary.local(targets, len(weight))


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        vocabulary: Vocabulary | None,
        keep_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        places, own = _owned(targets, weight, vocabulary)
        sums = _Sums.empty(rows)
        count = len(rows)
        differentiable = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keep = differentiable and count * len(weight) * rows.element_size() <= keep_bytes
        kept = rows.new_empty(count, len(weight)) if keep else None
        for start in range(0, count, PRODUCT_ROWS):
            part = slice(start, min(start + PRODUCT_ROWS, count))
            logits = torch.mm(rows[part], weight.t(), out=None if kept is None else kept[part])
            for block in _blocks(part, len(weight)):
                z = logits[block.start - start : block.stop - start].to(sums.top.dtype, copy=True)
                sums.fill(block, z, places[block], temperature, entropy=True)
        sums.join(vocabulary, own)
        norm = sums.norm()
        logprobs, entropy = sums.target - norm, norm - sums.moment / sums.total
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.wide, ctx.kept, ctx.own = temperature, norm.dtype, kept, own
        ctx.save_for_backward(rows, weight, places, entropy, norm)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        rows, weight, places, entropy, norm = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # overwritten below by its own gradient
        if grad_entropy is not None and not grad_entropy.any():
            grad_entropy = None
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        at_target = grad_logprobs if ctx.own is None else grad_logprobs * ctx.own
        grad_rows = torch.empty_like(rows)
        wanted = ctx.needs_input_grad[1]  # a frozen head has no gradient
        grad_weight = None
        if wanted and kept is None:
            grad_weight = torch.zeros(weight.shape, dtype=ctx.wide, device=weight.device)
        for start in range(0, len(rows), PRODUCT_ROWS):
            part = slice(start, min(start + PRODUCT_ROWS, len(rows)))
            logits = torch.mm(rows[part], weight.t()) if kept is None else kept[part]
            for block in _blocks(part, len(weight)):
                local = logits[block.start - start : block.stop - start]
                z = local.to(ctx.wide, copy=True)
                grad_z = _block_gradient(
                    z,
                    places[block],
                    at_target[block],
                    grad_logprobs[block],
                    None if grad_entropy is None else grad_entropy[block],
                    norm[block],
                    entropy[block],
                    ctx.temperature,
                )
                local.copy_(grad_z)
            torch.mm(logits, weight, out=grad_rows[part])
            if grad_weight is not None:
                grad_weight += torch.mm(logits.t(), rows[part])
        if wanted and kept is not None:
            grad_weight = torch.mm(kept.t(), rows)
        found = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_rows, found, None, None, None, None


def _blocks(part: slice, vocabulary: int) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // vocabulary)
    return [slice(i, min(i + size, part.stop)) for i in range(part.start, part.stop, size)]


def _block_gradient(
    z: torch.Tensor,
    places: torch.Tensor,
    at_target: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    norm: torch.Tensor,
    entropy: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """dL/d(raw logits) of a block of raw logits, which is overwritten. `at_target` is the gradient of the
    log probability where the target is among these logits, at `places`, else 0."""
    if temperature != 1.0:
        z.div_(temperature)
    log_p = z.sub_(norm[:, None])
    if grad_entropy is None:
        grad = log_p.exp_().mul_((-grad_logprobs / temperature)[:, None])
    else:
        factor = torch.addcmul(grad_logprobs[:, None], grad_entropy[:, None], log_p + entropy[:, None])
        grad = log_p.exp_().mul_(factor).div_(-temperature)
    grad.scatter_add_(1, places[:, None], (at_target / temperature)[:, None])
    return grad
