"""Attention over packed sequences: no padding in the batch, no mask in memory.

`transformers` models call the function registered as `NAME` once a layer, with the `Packing` of the
micro-batch, which `CausalModel.hidden` passes through the model's keyword arguments. No mask
function is registered under that name, so that `transformers` builds no mask.

On CUDA half precision goes to torch's variable-length flash attention. Everything else is computed
in buckets of sequences of similar length, padded at the right (a causal mask alone keeps real
tokens from seeing padding): short ones by explicit matrix products with the query heads of a KV
head folded into rows, longer ones by SDPA. See `docs/decisions-training.md` for the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from realflow.errors import InputError
from realflow.models.sharing import Shared

NAME = "realflow_packed"

SHORT = 256
"""Up to this many tokens explicit products beat the CPU's flash kernel (bf16: 3 times at 64)."""

WASTE = 32_768
"""Query-key pairs that a bucket may waste on padding: about what the calls of a bucket cost."""


def register() -> None:
    """Make `attn_implementation=NAME` known to `transformers` (may be called again)."""
    AttentionInterface.register(NAME, packed_attention)


@dataclass(frozen=True)
class Padding:
    """`gather` [S * L] picks a bucket's tokens from the packed batch (padding repeats a real token);
    `place` [tokens] says where in that form each real token is."""

    gather: torch.Tensor
    place: torch.Tensor


@dataclass(frozen=True)
class Bucket:
    """`count` sequences computed together, `length` being that of the longest. Where they are equally
    long and adjacent, `padding` is None, and they are the tokens from `start` on."""

    count: int
    length: int
    start: int
    padding: Padding | None


@dataclass(frozen=True)
class Packing:
    """How a packed micro-batch is divided into sequences; made once, used by every layer.

    `cu_seqlens` is int32 [S + 1]. `order` ([T] or None) restores packed order after the buckets'
    outputs are concatenated. With `shared` the states between attentions are those of distinct tokens.
    """

    cu_seqlens: torch.Tensor
    longest: int
    buckets: tuple[Bucket, ...]
    order: torch.Tensor | None
    shared: Shared | None = None
    biases: dict[tuple[int, int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, device: torch.device, shared: Shared | None = None) -> Packing:
        """Divide into buckets. `cu_seqlens` lies on the CPU; indices are made on `device`."""
        starts = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in pairwise(starts)]
        assert min(lengths, default=1) > 0, "a packed sequence has no tokens"
        groups = bucketize(lengths)
        buckets = tuple(_bucket(group, starts, lengths, device) for group in groups)
        order = None
        if [index for group in groups for index in group] != list(range(len(lengths))):
            taken = torch.cat([_tokens(group, starts, lengths) for group in groups])
            order = torch.empty_like(taken)
            order[taken] = torch.arange(len(taken))
            order = order.to(device)
        return cls(cu_seqlens.to(device, torch.int32), max(lengths, default=0), buckets, order, shared)

    def bias(self, length: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """[L, L]: 0 where a query may see a key (causal, within the window), else -inf."""
        key = (length, window, like.dtype)
        if key not in self.biases:
            hidden = ~visible(length, window, like.device)
            self.biases[key] = like.new_zeros(length, length).masked_fill_(hidden, float("-inf"))
        return self.biases[key]


def visible(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [L, L]: query i sees keys (i - window, i]; all up to i without a window."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def bucketize(lengths: Sequence[int]) -> list[list[int]]:
    """Group sequences (indices, in order of falling length) so that padding wastes little.

    Batches that need no reordering (equal lengths, or a single bucket) keep their order.
    """
    groups: list[list[int]] = []
    longest, waste = 0, 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        extra = longest**2 - lengths[index] ** 2
        if not groups or waste + extra > WASTE:
            groups.append([])
            longest, waste, extra = lengths[index], 0, 0
        groups[-1].append(index)
        waste += extra
    return [sorted(group) for group in groups]


def _tokens(group: list[int], starts: list[int], lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in group])


def _bucket(group: list[int], starts: list[int], lengths: list[int], device: torch.device) -> Bucket:
    longest = max(lengths[i] for i in group)
    first = starts[group[0]]
    contiguous = group == list(range(group[0], group[0] + len(group)))
    if contiguous and all(lengths[i] == longest for i in group):
        return Bucket(len(group), longest, first, None)
    begin = torch.tensor([starts[i] for i in group])[:, None]
    size = torch.tensor([lengths[i] for i in group])[:, None]
    column = torch.arange(longest)[None]
    gather = (begin + torch.minimum(column, size - 1)).flatten()
    place = (column < size).flatten().nonzero().flatten()
    return Bucket(len(group), longest, first, Padding(gather.to(device), place.to(device)))


class _Pad(torch.autograd.Function):
    """[T, ...] -> [S * L, ...]. Gradients of padding are exactly zero (the causal mask hides it from
    real tokens, whose outputs alone are used), so that both directions are plain row selections."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, padding: Padding) -> torch.Tensor:
        ctx.padding, ctx.shape = padding, packed.shape
        return packed.index_select(0, padding.gather)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = ctx.padding.gather.index_select(0, ctx.padding.place)
        real = grad.index_select(0, ctx.padding.place)
        if len(rows) == ctx.shape[0]:  # one bucket holds the whole batch, in packed order
            return real, None
        return grad.new_zeros(ctx.shape).index_copy_(0, rows, real), None


class _Unpad(torch.autograd.Function):
    """[S * L, ...] -> the bucket's real tokens, [tokens, ...]."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, padding: Padding) -> torch.Tensor:
        ctx.padding, ctx.shape = padding, padded.shape
        return padded.index_select(0, padding.place)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.padding.place, grad), None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a packed batch, in transformers' calling form.

    `query` [1, Hq, T, D]; `key`, `value` [1, Hkv, T, D], Hq a multiple of Hkv; with
    `packing.shared` only of the U distinct tokens. Where `module` has an attribute `kv_picks` (int64),
    its key and value heads are these ones of `key` and `value` (`Partition.kv_picks`). Returns
    [1, T or U, Hq, D]. Raises InputError for what it does not compute (soft caps, sinks, biases).
    """
    _refuse(module, attention_mask, dropout, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window and sliding_window < packing.longest else None
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T or U, H, D]
    picks = getattr(module, "kv_picks", None)
    if picks is not None:
        k, v = k.index_select(1, picks), v.index_select(1, picks)
    output = attend_packed(q, k, v, packing, scale, window)
    return output[None], None


def attend_packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scale: float, window: int | None
) -> torch.Tensor:
    """Attention of `q` [T or U, Hq, D] and `k`, `v` [T or U, Hkv, D]: [T or U, Hq, D], by whichever kernel
    suits the device. (U: with `packing.shared`, whose tokens are spread over all and one copy kept.)"""
    shared = packing.shared
    if shared is not None:
        q, k, v = shared.repeat(q), shared.repeat(k), shared.repeat(v)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        output = _varlen(q, k, v, packing, scale, window)
        return output if shared is None else shared.distinct(output)
    parts = [_attend(q, k, v, bucket, packing, scale, window) for bucket in packing.buckets]
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    if packing.order is not None:
        output = output.index_select(0, packing.order)
    return output if shared is None else shared.distinct(output)


def _refuse(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    found = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    found += ["attention_mask"] if attention_mask is not None else []
    found += ["dropout"] if dropout else []
    found += ["bidirectional attention"] if not getattr(module, "is_causal", True) else []
    if found:
        raise InputError(
            f"{type(module).__name__} asks for attention with {', '.join(found)}, which packed attention "
            "does not compute; choose a model with plain causal or sliding-window attention"
        )


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scale: float, window: int | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imports CUDA parts: only where they are

    span = (-1, 0) if window is None else (window - 1, 0)  # keys to the left of the query's own
    cu, longest = packing.cu_seqlens, packing.longest
    output = varlen_attn(
        q,
        k,
        v,
        cu,
        cu,
        longest,
        longest,
        scale=scale,
        window_size=span,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bucket: Bucket,
    packing: Packing,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Attention of one bucket: [tokens of the bucket, Hq, D]."""
    count, length = bucket.count, bucket.length
    if bucket.padding is None:
        rows = slice(bucket.start, bucket.start + count * length)
        q, k, v = q[rows], k[rows], v[rows]
    else:
        q, k, v = (_Pad.apply(tensor, bucket.padding) for tensor in (q, k, v))
    q, k, v = (tensor.reshape(count, length, *tensor.shape[1:]) for tensor in (q, k, v))
    compute = _products if length <= SHORT else _sdpa
    output = compute(q, k, v, packing, scale, window).reshape(count * length, *q.shape[2:])
    return output if bucket.padding is None else _Unpad.apply(output, bucket.padding)


def _products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scale: float, window: int | None
) -> torch.Tensor:
    """[S, L, Hq, D] by two batched products, one problem for each sequence and KV head."""
    count, length, heads, width = q.shape
    kv_heads = k.shape[2]
    folded = heads // kv_heads
    q = q.reshape(count, length, kv_heads, folded, width).permute(0, 2, 3, 1, 4)
    q = q.reshape(count * kv_heads, folded * length, width)
    k, v = (x.transpose(1, 2).reshape(count * kv_heads, length, width) for x in (k, v))
    bias = packing.bias(length, window, q).repeat(folded, 1)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    output = torch.bmm(torch.softmax(scores, -1), v)
    output = output.view(count, kv_heads, folded, length, width).permute(0, 3, 1, 2, 4)
    return output.reshape(count, length, heads, width)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, scale: float, window: int | None
) -> torch.Tensor:
    """[S, L, Hq, D] by scaled_dot_product_attention."""
    length = q.shape[1]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mask = None if window is None or window >= length else packing.bias(length, window, q)
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output.transpose(1, 2)
