"""One forward pass of running and newly admitted sequences through a Hugging Face decoder.

All tokens of a pass are packed in one dim: first one row for each of the slots 0..B-1 (the newest
token of the sequence in that slot), then the prefixes that enter the cache in this pass. A
sequence that is admitted is therefore nothing special: its prompt without the last token is
prefilled into its slot, and the last token is the slot's row. Keys and values are written before
attention reads them, so both happen in the same pass, and prompts share weights' reads with
decoding.

`ModuleDecoder` runs the model's own modules with an attention function of ours (any causal model
that takes one from transformers' `AttentionInterface`); `realflow.engines.fused` has the faster
form for layers whose structure is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from realflow.engines.kv_cache import CacheShape, KVCache
from realflow.errors import InputError

ATTENTION = "realflow_decode"
_KEYWORD = "realflow_pass"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class Prefix:
    """`tokens` to prefill in `slot` from position `start` on (what lies before is there already).

    `copies` are (slot, length) that then get the first tokens of this slot: whole prefixes of
    other samples, or the begin of a later `Prefix` of this pass.
    """

    slot: int
    tokens: tuple[int, ...]
    start: int = 0
    copies: tuple[tuple[int, int], ...] = ()


class Pass:
    """What one forward pass needs to know; T = B + the tokens of all prefixes.

    `tokens`, `positions` int64 [T]; `newest` and `lengths` give, for the slots 0..B-1, the newest
    token and the number of tokens including it.
    """

    def __init__(
        self, cache: KVCache, newest: Sequence[int], lengths: Sequence[int], prefixes: Sequence[Prefix]
    ) -> None:
        self.cache = cache
        self.slots = len(newest)
        self.prefixes = prefixes
        device = cache.device
        tokens, positions, slots = list(newest), [n - 1 for n in lengths], list(range(len(newest)))
        for prefix in prefixes:
            tokens.extend(prefix.tokens)
            positions.extend(range(prefix.start, prefix.start + len(prefix.tokens)))
            slots.extend([prefix.slot] * len(prefix.tokens))
        self.tokens = torch.tensor(tokens, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.layers_seen = 0
        self._longest = max(lengths)
        self._shortest = min(lengths)
        self._lengths = torch.tensor(list(lengths), device=device)
        self._rows = cache.rows(torch.tensor(slots, device=device), self.positions)
        self._views = cache.read(self.slots, self._longest)
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def attend(
        self, layer: int, query: torch.Tensor, pairs: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of one layer, keys and values of the pass being stored first.

        `query` is [T, heads, D], `pairs` (keys, values) [T, 2, kv_heads, D]; returns [T, heads, D].
        """
        self.cache.write(layer, self._rows, pairs)
        prefilled = []
        start = self.slots
        for prefix in self.prefixes:
            stop = start + len(prefix.tokens)
            keys, values = self.cache.read_slot(layer, prefix.slot, prefix.start + len(prefix.tokens))
            prefilled.append(_attend_causally(query[start:stop], keys, values, scale, window))
            for slot, length in prefix.copies:
                self.cache.copy(prefix.slot, slot, length, layer)
            start = stop
        keys, values = self._views[layer]
        # The query heads of one key/value head are taken as rows, so that nothing is repeated.
        grouped = query[: self.slots].unflatten(1, (keys.shape[1], -1))
        attended = _attend_to_cache(grouped, keys, values, self._mask(window), scale).flatten(1, 2)
        self.layers_seen += 1
        return torch.cat([attended, *prefilled]) if prefilled else attended

    def _mask(self, window: int | None) -> torch.Tensor | None:
        """Additive mask [B, 1, 1, longest], None where every slot sees every position."""
        if window not in self._masks:
            mask = None
            if self._shortest < self._longest or (window is not None and window < self._longest):
                places = torch.arange(self._longest, device=self._lengths.device)
                hidden = places >= self._lengths[:, None]
                if window is not None:
                    hidden |= places < self._lengths[:, None] - window
                mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=places.device)
                mask = mask.masked_fill_(hidden, -math.inf)[:, None, None]
            self._masks[window] = mask
        return self._masks[window]


def _attend_to_cache(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of each slot's newest token: query [B, kv_heads, groups, D], keys [B, kv_heads, L, D]."""
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    # For so few rows torch's CPU kernel takes half as long again as these products, which round in
    # the same places: scores in float32, weights in bfloat16.
    scores = torch.matmul(query.float().mul_(scale), keys.float().transpose(-1, -2))
    if mask is not None:
        scores.add_(mask)
    return torch.matmul(scores.softmax(-1).to(query.dtype), values)


def _attend_causally(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Attention of one sequence's last m of n tokens: query [m, heads, D], keys [kv_heads, n, D]."""
    m, n = len(query), keys.shape[1]
    mask = None
    if m < n or (window is not None and window < n):
        distance = torch.arange(n - m, n, device=query.device)[:, None] - torch.arange(n, device=query.device)
        mask = (distance >= 0) & (distance < (n if window is None else window))
    groups = query.shape[1] // keys.shape[0]
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.repeat_interleave(groups, 0)[None],
        values.repeat_interleave(groups, 0)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[0].transpose(0, 1)


class Decoder(Protocol):
    """Runs passes."""

    def __call__(self, step: Pass) -> torch.Tensor:
        """The logits [B, vocabulary] of the slots' rows."""


class ModuleDecoder:
    """Any causal decoder of transformers, through its own forward."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        register_attention()

    def __call__(self, step: Pass) -> torch.Tensor:
        """The logits [B, vocabulary] of the slots' rows."""
        with _decoding(self.module):
            output = self.module(
                input_ids=step.tokens[None],
                position_ids=step.positions[None],
                use_cache=False,
                logits_to_keep=torch.arange(step.slots, device=step.tokens.device),
                **{_KEYWORD: step},
            )
        if step.layers_seen != step.cache.shape.layers:
            raise InputError(
                f"model {type(self.module).__name__}: {step.layers_seen} of {step.cache.shape.layers} layers "
                "used the attention function; native generation needs a plain decoder, use the vllm engine"
            )
        return output.logits[0]


@contextmanager
def _decoding(module: PreTrainedModel) -> Iterator[None]:
    """Our attention function and evaluation mode, as long as the pass runs."""
    before, training = module.config._attn_implementation, module.training
    module.config._attn_implementation = ATTENTION
    if training:
        module.eval()
    try:
        yield
    finally:
        module.config._attn_implementation = before
        if training:
            module.train()


def register_attention() -> None:
    """Make `realflow_decode` known to transformers. Can be repeated."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The pass knows what each row may see."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over a `Pass`: query [1, heads, T, D] -> [1, T, heads, D]."""
    step = kwargs.get(_KEYWORD)
    refused = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if not isinstance(step, Pass) or refused or key.shape != value.shape:
        what = (
            f"uses {', '.join(refused)}" if refused else "does not hand its arguments to attention as usual"
        )
        raise InputError(
            f"model: {type(module).__name__} {what}; native generation cannot run it, use the vllm engine"
        )
    assert isinstance(module.layer_idx, int)
    pairs = torch.stack([key[0], value[0]]).permute(2, 0, 1, 3)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = step.attend(module.layer_idx, query[0].transpose(0, 1), pairs, scale=scale, window=sliding_window)
    return out[None], None


def cache_shape(module: PreTrainedModel, slots: int, length: int) -> CacheShape:
    """The cache that a model needs. Raises InputError where the model cannot be decoded this way."""
    config = module.config.get_text_config()
    name = type(module).__name__
    strange = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange or not getattr(module, "_supports_attention_backend", False):
        found = f"layers of type {', '.join(sorted(strange))}" if strange else "attention of its own"
        raise InputError(f"model {name} has {found}; native generation needs full or sliding attention")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(
            f"generation: max_length {length} is more than the {limit} positions of model {name}; "
            "shorten prompts or max_new_tokens"
        )
    _check_rope(config, length, name)
    heads = config.num_attention_heads
    return CacheShape(
        layers=config.num_hidden_layers,
        slots=slots,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        length=length,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _check_rope(config: Any, length: int, name: str) -> None:
    """Refuse rotary embeddings that depend on the longest sequence of a batch, where they would."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = part.get("rope_type")
        original = part.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind in _LENGTH_DEPENDENT_ROPE and length > original:
            raise InputError(
                f"model {name}: rope type {kind} beyond {original} positions makes a sample depend on the "
                f"others in its batch; set max_length (now {length}) to at most {original}"
            )
