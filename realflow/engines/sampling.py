"""From logits to tokens: one uniform number for each draw, against the cumulated probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from realflow.errors import RunError
from realflow.graph.types import Sampling

_CHUNK = 128
_FIRST_TRY = 1024  # how many of the largest logits are sorted before all of them are


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token for each row.

    `logits` is [B, V] in any float dtype, `uniforms` float64 [B] in [0, 1). Returns tokens int64
    [B] and logprobs [B] (float64 for float64 logits, else float32): those of the distribution that
    was sampled, after temperature and renormalised after top-k and top-p. Temperature 0 takes the
    largest logit and reports its log probability at temperature 1. A row's result depends on that
    row alone. Raises RunError where logits are not finite.
    """
    work = work_dtype(logits)
    greedy = sampling.temperature == 0.0
    scaled = logits
    if not greedy and sampling.temperature != 1.0:
        scaled = logits.to(work) / sampling.temperature
    if not greedy:
        scaled = restrict(scaled, sampling.top_k, sampling.top_p)
    masses = chunked(scaled.softmax(-1, dtype=work))  # one fused pass over the logits
    chunks = masses.sum(-1).double()
    cumulated = chunks.cumsum(-1)
    total = cumulated[:, -1:]
    check_finite(total)
    if greedy:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        tokens = locate(masses, chunks, cumulated, uniforms[:, None].to(total.device) * total)
    logprobs = masses.flatten(1).gather(-1, tokens).double().log() - total.log()
    return tokens[:, 0], logprobs[:, 0].to(work)


def restrict(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set logits outside the `top_k` largest, then outside the `top_p` nucleus of what remains, to -inf.

    The nucleus is the smallest set of most probable tokens whose probabilities sum to at least
    `top_p`. Tokens whose logit equals the last one kept are kept as well, so that the result does
    not depend on the order of a sort (bfloat16 logits often tie). 0 and 1.0 switch them off.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        logits = logits.masked_fill(logits < _nucleus_edge(logits, top_p), -torch.inf)
    return logits


def _nucleus_edge(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest logit inside the nucleus: [B, 1]."""
    total = logits.to(work_dtype(logits)).logsumexp(-1, keepdim=True)
    size = min(_FIRST_TRY, logits.shape[-1])
    while True:
        largest = logits.topk(size, dim=-1).values
        cumulated = (largest - total).exp().cumsum(-1)
        if size == logits.shape[-1] or bool((cumulated[:, -1] >= top_p).all()):
            inside = (cumulated < top_p).sum(-1, keepdim=True).clamp(max=size - 1)
            return largest.gather(-1, inside)
        size = logits.shape[-1]


def work_dtype(logits: torch.Tensor) -> torch.dtype:
    """What masses and log probabilities are computed in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check_finite(total: torch.Tensor) -> None:
    """Raise RunError where the sum of a row's masses shows that its logits were not finite."""
    if not bool(torch.isfinite(total).all()):
        raise RunError(
            "generation: the model's logits are not finite (NaN or infinite); weights may be broken"
        )


def chunked(masses: torch.Tensor) -> torch.Tensor:
    """[B, V] as [B, chunks, 128], zeros behind the end."""
    if masses.shape[-1] % _CHUNK:
        masses = F.pad(masses, (0, -masses.shape[-1] % _CHUNK))
    return masses.unflatten(-1, (-1, _CHUNK))


def locate(
    masses: torch.Tensor, chunks: torch.Tensor, cumulated: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """The first token whose cumulated mass exceeds `target` (float64 [B, 1]): int64 [B, 1].

    `masses` as `chunked` gives them, `chunks` float64 [B, chunks] the chunks' sums and `cumulated`
    the sums up to each. Two levels (the chunk, then the token in it) read the masses once. The bounds
    stay below the last cumulated value in spite of rounding, so that a token of mass zero is never
    drawn.
    """
    target = torch.minimum(target, _below(cumulated[:, -1:]))
    chunk = torch.searchsorted(cumulated, target, right=True)
    before = cumulated.gather(-1, chunk) - chunks.gather(-1, chunk)
    inner = masses[torch.arange(len(masses), device=masses.device), chunk[:, 0]].double().cumsum(-1)
    rest = torch.minimum((target - before).clamp_(min=0), _below(inner[:, -1:]))
    return chunk * _CHUNK + torch.searchsorted(inner, rest, right=True)


def _below(value: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(value, torch.zeros_like(value))
