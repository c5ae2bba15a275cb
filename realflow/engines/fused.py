"""Decoding for Llama-like layers, written out: fewer and larger operations, the same rounding.

What is fused are the products with the query, key and value weights, and with the gate and up
weights. Where their parameters lie next to each other in memory, as in the flat parameter buffer,
one product reads all of them through a view; nothing is copied, so weights that a trainer replaces
in place are seen by the next pass. Norms and rotary embeddings keep the rounding of the modules.

Over tensor ranks each has some of the heads, of the columns between gate-up and down, and of the
vocabulary; what they add up is the output of attention, that of the MLP, and the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from realflow.engines.decode import Decoder, ModuleDecoder
from realflow.engines.part import HoldsPart, heads_of
from realflow.engines.passes import Pass
from realflow.models import tensor as tensor_parallel
from realflow.models.lora import LowRank, is_adapted, without_adapter
from realflow.models.place import Axis
from realflow.models.stages import Elsewhere

_FAMILIES = (
    (modeling_llama, "Llama"),
    (modeling_mistral, "Mistral"),
    (modeling_qwen2, "Qwen2"),
    (modeling_qwen3, "Qwen3"),
)
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")


@dataclass(frozen=True)
class Linear:
    """Several linear layers with one input. One weight for all where memory allows, else one for each.

    `low` are their adapters, each with the outputs that it adds to: `[start, stop)`.
    """

    parts: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    low: tuple[tuple[int, int, LowRank], ...] = ()

    @classmethod
    def of(cls, *modules: nn.Module) -> Linear:
        """The layers side by side, as views of their parameters."""
        layers, low, start = [], [], 0
        for module in modules:
            layer, beside = without_adapter(module)
            layers.append(layer)
            stop = start + len(layer.weight)
            low += [] if beside is None else [(start, stop, beside)]
            start = stop
        weight = adjacent([layer.weight for layer in layers])
        biased = layers[0].bias is not None
        bias = adjacent([layer.bias for layer in layers]) if biased else None
        if weight is None or (biased and bias is None):
            return cls(tuple((layer.weight, layer.bias) for layer in layers), tuple(low))
        return cls(((weight, bias),), tuple(low))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """All outputs, one after the other in the last dim."""
        if len(self.parts) == 1:
            return self._adapted(x, F.linear(x, *self.parts[0]))
        return self._adapted(x, torch.cat([F.linear(x, weight, bias) for weight, bias in self.parts], -1))

    def _adapted(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out`, in place: what adapters make of `x` added, rounded where their modules round."""
        for start, stop, (a, b, scale) in self.low:
            out[..., start:stop] += F.linear(F.linear(x, a), b).mul_(scale)
        return out

    def summed(self, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        """The product of a layer that is cut along its inputs: the sum over `axis`, the bias once."""
        if axis.size == 1:
            return self(x)
        ((weight, bias),) = self.parts
        total = summed(self._adapted(x, F.linear(x, weight)), axis)
        return total if bias is None else total.add_(bias)

    def is_faster_transposed(self, x: torch.Tensor) -> bool:
        """Whether `transposed` saves time: measured for bfloat16 on CPUs, where oneDNN repacks the
        weights in each product unless they are its left factor (8 % of an MLP at 32 rows)."""
        single = len(self.parts) == 1 and self.parts[0][1] is None and not self.low
        return single and x.dtype == torch.bfloat16 and x.device.type == "cpu" and 16 <= len(x) <= 128

    def transposed(self, x: torch.Tensor) -> torch.Tensor:
        """weight @ x for x [inputs, T]: the same numbers as [outputs, T]. Without bias."""
        return torch.mm(self.parts[0][0], x)


def adjacent(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Tensors of equal trailing dims as one view [sum of rows, ...]; None unless they lie end to end."""
    first = tensors[0].detach()
    offset = first.storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.is_contiguous() and tensor.storage_offset() == offset):
            return None
        offset += tensor.numel()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def summed(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`x`, contiguous, in place: the sum over the ranks of `axis`."""
    if axis.size > 1:
        dist.all_reduce(x, group=axis.group)
    return x


@dataclass(frozen=True)
class Norm:
    """An RMS norm module: statistics in float32 (float64 for float64 models), rounded to the model's
    dtype before the weight."""

    module: Any

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Like `x`, normalised over the last dim."""
        eps = self.module.variance_epsilon
        wide = x if x.dtype == torch.float64 else x.float()
        normed = F.rms_norm(wide, x.shape[-1:], None, eps)
        scaled: torch.Tensor = self.module.weight * normed.to(x.dtype)
        return scaled


@dataclass(frozen=True)
class Layer:
    """The parts of one decoder layer."""

    index: int
    before_attention: Norm
    qkv: Linear
    head_norms: tuple[Norm, Norm] | None
    out: Linear
    before_mlp: Norm
    gate_up: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: Linear
    heads: int
    kv_heads: int
    scale: float
    window: int | None
    tp: Axis

    def attention(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: Pass) -> torch.Tensor:
        """Attention's output before the residual: [T, hidden]. `sin` has the sign of rotate_half."""
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        rotated = qkv[:, : self.heads + self.kv_heads]
        if self.head_norms:
            query_norm, key_norm = self.head_norms
            qkv[:, : self.heads] = query_norm(qkv[:, : self.heads])
            rotated[:, self.heads :] = key_norm(rotated[:, self.heads :])
        swapped = rotated.roll(rotated.shape[-1] // 2, -1).mul_(sin)
        rotated.mul_(cos).add_(swapped)
        pairs = qkv[:, self.heads :].unflatten(1, (2, self.kv_heads))
        query = qkv[:, : self.heads]
        attended = step.attend(self.index, query, pairs, scale=self.scale, window=self.window)
        return self.out.summed(attended.flatten(1), self.tp)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """The feed-forward part before the residual: [T, hidden]."""
        x = self.before_mlp(x)
        if self.gate_up.is_faster_transposed(x) and not self.down.low:
            gate, up = self.gate_up.transposed(x.t()).chunk(2, 0)
            return summed(self.down.transposed(self.activation(gate).mul_(up)), self.tp).t()
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down.summed(self.activation(gate).mul_(up), self.tp)


class FusedDecoder:
    """Llama, Mistral, Qwen2 and Qwen3 without their modules' overhead. Equal to `ModuleDecoder`."""

    def __init__(self, model: HoldsPart) -> None:
        self.model = model
        self.module = model.module
        self._tp = model.place.tp
        self._anchor = next(self.module.parameters())  # they are views of one buffer: one tells of all
        self._build()

    def _build(self) -> None:
        self.address = self._anchor.data_ptr()
        layers, stage = self.module.model.layers, self.model.stage
        heads = heads_of(self.model)
        sizes = heads.query, heads.computed
        self._layers = [_layer(layers[i], i, sizes, self._tp) for i in range(stage.first, stage.stop)]
        self._norm = Norm(self.module.model.norm)

    def refresh(self) -> None:
        """Look for the weights again if they were moved, not only overwritten (`address` tells)."""
        if self._anchor.data_ptr() != self.address:
            self._build()

    def __call__(self, step: Pass, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """See `Decoder`. `hidden` is overwritten."""
        self.refresh()
        base = self.module.model
        x = self._embed(step.tokens) if hidden is None else hidden
        cos, sin = base.rotary_emb(x[None], step.positions[None])
        cos, sin = cos[0][:, None], sin[0][:, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        for layer in self._layers:
            x += layer.attention(x, cos, sin, step)
            x += layer.mlp(x)
        if not self.model.stage.ends:
            return x
        return self.module.lm_head(self._norm(x[: step.slots]))

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows [T, H] of the embedding, each of which one tensor rank has; exact, the others' are zero."""
        weight = self.module.model.embed_tokens.weight
        if self._tp.size == 1:
            return F.embedding(tokens, weight)
        local = tokens - self.model.partition.vocabulary(self._tp.index)[0]
        foreign = (local < 0) | (local >= len(weight))
        found = F.embedding(local.masked_fill_(foreign, 0), weight)
        return summed(found.masked_fill_(foreign[:, None], 0), self._tp)


def _layer(module: Any, index: int, heads: tuple[int, int], tp: Axis) -> Layer:
    """The parts of one layer with this many query and key-value heads."""
    attention, mlp = module.self_attn, module.mlp
    norms = (Norm(attention.q_norm), Norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
    window = getattr(attention, "sliding_window", None)
    if isinstance(module, modeling_mistral.MistralDecoderLayer):
        window = attention.config.sliding_window
    return Layer(
        index=index,
        before_attention=Norm(module.input_layernorm),
        qkv=Linear.of(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=norms,
        out=Linear.of(attention.o_proj),
        before_mlp=Norm(module.post_attention_layernorm),
        gate_up=Linear.of(mlp.gate_proj, mlp.up_proj),
        activation=mlp.act_fn,
        down=Linear.of(mlp.down_proj),
        heads=heads[0],
        kv_heads=heads[1],
        scale=attention.scaling,
        window=window,
        tp=tp,
    )


def is_fusible(module: PreTrainedModel) -> bool:
    """Whether every part of the model is exactly the class that `FusedDecoder` writes out.

    A subclass, another adapter than `realflow.models.lora` makes or a hook on any part may change the
    answer; such models are left to their own modules.
    """
    for source, prefix in _FAMILIES:
        if type(module) is getattr(source, f"{prefix}ForCausalLM"):
            known = {getattr(source, prefix + part) for part in _PARTS}
            known |= {nn.Linear, nn.Embedding, nn.ModuleList, nn.ModuleDict, Elsewhere}
            return all(_is_plain(part, known) for part in module.modules())
    return False


def _is_plain(part: nn.Module, known: set[type]) -> bool:
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    if "forward" in vars(part):
        hooks.append(vars(part)["forward"])
    changed = any(not _is_of_tensor_ranks(hook) for hook in hooks)
    activation = not list(part.children()) and not list(part.parameters())
    return not changed and (type(part) in known or activation or is_adapted(part))


def _is_of_tensor_ranks(hook: Any) -> bool:
    """Whether a hook is of those that make a cut module communicate, which is written out here as well."""
    return getattr(getattr(hook, "func", None), "__module__", None) == tensor_parallel.__name__


def make_decoder(model: HoldsPart) -> Decoder:
    """The fastest decoder that gives the model's own answers."""
    return FusedDecoder(model) if is_fusible(model.module) else ModuleDecoder(model)
