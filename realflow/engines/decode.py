"""A pass through the modules of a Hugging Face decoder.

`ModuleDecoder` runs the model's own modules with an attention function of ours (any causal model
that takes one from transformers' `AttentionInterface`); `realflow.engines.fused` has the faster
form for layers whose structure is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from realflow.engines.part import HoldsPart, dtype_of
from realflow.engines.passes import Pass
from realflow.errors import InputError
from realflow.models.precision import full_precision

ATTENTION = "realflow_decode"
_KEYWORD = "realflow_pass"


class Decoder(Protocol):
    """Runs passes through what one rank has of a model."""

    def __call__(self, step: Pass, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [T, H] for the next stage; on the last stage the logits [B, V] of the slots'
        rows, for the token ids of this rank. `hidden` [T, H] comes from the stage before; None on the
        first."""


class ModuleDecoder:
    """Any causal decoder of transformers, through its own forward."""

    def __init__(self, model: HoldsPart) -> None:
        self.model = model
        self.module = model.module
        self._dtype, _ = dtype_of(self.module)
        register_attention()

    def __call__(self, step: Pass, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """See `Decoder`."""
        inputs: dict[str, Any] = {"input_ids": step.tokens[None]}
        if hidden is not None:
            inputs = {"inputs_embeds": hidden[None], "entering": hidden[None]}
        with self._decoding(len(step.tokens)):
            output = self.module.base_model(
                position_ids=step.positions[None], use_cache=False, **inputs, **{_KEYWORD: step}
            )
        if step.layers_seen != step.cache.shape.layers:
            raise InputError(
                f"model {type(self.module).__name__}: {step.layers_seen} of {step.cache.shape.layers} layers "
                "used the attention function; native generation needs a plain decoder, use the vllm engine"
            )
        states: torch.Tensor = output.last_hidden_state[0]
        if not self.model.stage.ends:
            return states
        logits: torch.Tensor = self.module.get_output_embeddings()(states[: step.slots])
        return logits

    @contextmanager
    def _decoding(self, rows: int) -> Iterator[None]:
        """Our attention function and evaluation mode, as long as the pass runs."""
        module = self.module
        before, training = module.config._attn_implementation, module.training
        module.config._attn_implementation = ATTENTION
        if training:
            module.eval()
        try:
            with self.model.region.passing(rows, sequence=False), full_precision(self._dtype):
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
