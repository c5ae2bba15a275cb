"""Log probabilities of given tokens, with their gradient, without full float32 logits.

For hidden rows h and head weight W: z = (W h) / temperature, logp = z[t] - log sum exp z, and the
entropy H = log sum exp z - sum p z with p = softmax(z). Backward (g, e: gradients of logp, H):

    dL/dz = g (onehot(t) - p) - e p (log p + H)

Rows are worked through in blocks that stay in the cache. The raw logits of a block, in the compute
dtype, are kept for the backward pass while they fit in `keep_bytes` altogether, and are recomputed
otherwise; both give the same numbers.

A vocabulary-parallel head has the same shape: its rank's `weight` holds some of the rows, and the
three reductions over the vocabulary (`_Block`: maximum, sums, target's logit) become all-reduces.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

KEEP_BYTES = 256 * 2**20
"""Default limit of the logits kept for backward."""

PRODUCT_ROWS = 256
"""Rows of one matrix product of the head."""

BLOCK_ELEMENTS = 2**20
"""Logits worked on at once in float32: 4 MiB, about a CPU core's cache."""


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
    keep_bytes: int = KEEP_BYTES,
) -> TokenStats:
    """Log probabilities of `targets` (int64 [R]) and entropies of the distributions at `rows`.

    `rows` [R, H] and `weight` [V, H] are in the compute dtype; both results are differentiable in
    them. `temperature` divides the logits and must be positive (greedy tokens have no
    distribution of their own: they are scored at temperature 1).
    """
    assert temperature > 0, temperature
    return TokenStats(*_TokenStats.apply(rows, weight, targets, temperature, keep_bytes))


@torch.no_grad()
def token_logprobs(
    rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """The log probabilities of `token_stats`, bit for bit, without entropies and without gradients."""
    assert temperature > 0, temperature
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    logprobs = rows.new_empty(len(rows), dtype=wide)
    for start in range(0, len(rows), PRODUCT_ROWS):
        part = slice(start, min(start + PRODUCT_ROWS, len(rows)))
        logits = torch.mm(rows[part], weight.t())
        for block in _blocks(part, len(weight)):
            z = logits[block.start - start : block.stop - start].to(wide, copy=True)
            target, top, weights = _exponentials(z, targets[block], temperature)
            logprobs[block] = target - (top + weights.sum(1).log())
    return logprobs


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        keep_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        count = len(rows)
        logprobs, entropy, norm = (rows.new_empty(count, dtype=wide) for _ in range(3))
        differentiable = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keep = differentiable and count * len(weight) * rows.element_size() <= keep_bytes
        kept = rows.new_empty(count, len(weight)) if keep else None
        for start in range(0, count, PRODUCT_ROWS):
            part = slice(start, min(start + PRODUCT_ROWS, count))
            logits = torch.mm(rows[part], weight.t(), out=None if kept is None else kept[part])
            for block in _blocks(part, len(weight)):
                z = logits[block.start - start : block.stop - start].to(wide, copy=True)
                stats = _block_stats(z, targets[block], temperature)
                logprobs[block], entropy[block], norm[block] = stats
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.wide, ctx.kept = temperature, wide, kept
        ctx.save_for_backward(rows, weight, targets, entropy, norm)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        rows, weight, targets, entropy, norm = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # overwritten below by its own gradient
        if grad_entropy is not None and not grad_entropy.any():
            grad_entropy = None
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        grad_rows = torch.empty_like(rows)
        whole = kept is not None
        grad_weight = None if whole else torch.zeros(weight.shape, dtype=ctx.wide, device=weight.device)
        for start in range(0, len(rows), PRODUCT_ROWS):
            part = slice(start, min(start + PRODUCT_ROWS, len(rows)))
            logits = torch.mm(rows[part], weight.t()) if kept is None else kept[part]
            for block in _blocks(part, len(weight)):
                local = logits[block.start - start : block.stop - start]
                z = local.to(ctx.wide, copy=True)
                grad_z = _block_gradient(
                    z,
                    targets[block],
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
        if kept is not None:
            grad_weight = torch.mm(kept.t(), rows)
        assert grad_weight is not None
        return grad_rows, grad_weight.to(weight.dtype), None, None, None


def _blocks(part: slice, vocabulary: int) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // vocabulary)
    return [slice(i, min(i + size, part.stop)) for i in range(part.start, part.stop, size)]


def _block_stats(
    z: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log probability, entropy and log sum exp of a block of raw logits, which is overwritten."""
    target, top, weights = _exponentials(z, targets, temperature)
    total = weights.sum(1)
    mean = torch.linalg.vecdot(weights, z) / total  # sum of p z
    norm = top + total.log()
    return target - norm, norm - mean, norm


def _exponentials(
    z: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The target's logit, the maximum, and exp(z - maximum), of raw logits that are scaled in place."""
    if temperature != 1.0:
        z.div_(temperature)
    top = z.amax(1)
    return z.gather(1, targets[:, None])[:, 0], top, torch.sub(z, top[:, None]).exp_()


def _block_gradient(
    z: torch.Tensor,
    targets: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    norm: torch.Tensor,
    entropy: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """dL/d(raw logits) of a block of raw logits, which is overwritten."""
    if temperature != 1.0:
        z.div_(temperature)
    log_p = z.sub_(norm[:, None])
    if grad_entropy is None:
        grad = log_p.exp_().mul_((-grad_logprobs / temperature)[:, None])
    else:
        factor = torch.addcmul(grad_logprobs[:, None], grad_entropy[:, None], log_p + entropy[:, None])
        grad = log_p.exp_().mul_(factor).div_(-temperature)
    grad.scatter_add_(1, targets[:, None], (grad_logprobs / temperature)[:, None])
    return grad
