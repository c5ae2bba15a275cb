"""A Hugging Face module without memory for its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from realflow.errors import InputError
from realflow.models import attention

_ATTENTION_KINDS = {"full_attention", "sliding_attention"}

HEADS = ("lm", "value", "reward")


def build_module(folder: Path, dtype: torch.dtype, head: str) -> PreTrainedModel:
    """The module of a model folder's config, in evaluation mode, its large tensors on the meta device.

    `head` is `lm` (a causal language model), or `value` or `reward` (a sequence classifier with one
    number). Buffers that no checkpoint holds, such as rotary frequencies, are as `from_pretrained`
    makes them. Raises InputError for what this library cannot run.
    """
    attention.register()
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(f"model {folder}: its weights are quantized; expected plain floating-point ones")
        if head != "lm":
            config.num_labels = 1
        with _Hollow():
            module: PreTrainedModel = auto.from_config(
                config, dtype=dtype, attn_implementation=attention.NAME
            ).eval()
        if module.can_generate() and (folder / "generation_config.json").is_file():
            module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model {folder}: {error}") from error
    if not module._supports_attention_backend:
        raise InputError(
            f"model {folder}: {type(module).__name__} does not take an attention function of another library"
        )
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if lost:
        raise InputError(
            f"model {folder}: {type(module).__name__} has the buffer {lost[0]}, left without a value"
        )
    _check_layers(module, folder)
    if head == "lm":
        _check_head(module, folder)
    return module


_DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class _Hollow(TorchFunctionMode):
    """Tensors that are made without values, as those of weights are, get no memory, and no draws either
    (which take the time of a small model's load even without memory)."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        elif func in _DRAWS and kwargs["tensor"].is_meta:  # torch.nn.init passes it by name
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _check_layers(module: PreTrainedModel, folder: Path) -> None:
    """Packed sequences may meet in attention alone, which keeps them apart."""
    kinds = set(getattr(module.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_KINDS
    mixing = next((type(part).__name__ for part in module.modules() if isinstance(part, nn.Conv1d)), None)
    if kinds or mixing:
        raise InputError(
            f"model {folder}: {type(module).__name__} has layers of the kind "
            f"{mixing or sorted(kinds)[0]}, which mix the tokens of packed sequences; expected full and "
            "sliding-window attention only"
        )


class _Output(SimpleNamespace):
    """A base model's output; what else a model's forward reads of one is None."""

    def __getattr__(self, name: str) -> None:
        return None


class _Known(nn.Module):
    """Stands for a base model: its hidden states are `states`."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        """Whatever goes in, `states` come out."""
        return _Output(last_hidden_state=self.states)


def _check_head(module: PreTrainedModel, folder: Path) -> None:
    """Logits must be `head @ hidden` alone: soft caps and scales of logits are not computed here.

    The model's own forward is run with known hidden states in place of its base and a head that hands
    them on: whatever it does to its logits shows.
    """
    head, base = module.get_output_embeddings(), module.base_model_prefix
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise InputError(f"model {folder}: expected a linear head without bias")
    name = next(key for key, part in module.named_modules() if part is head)
    states = torch.linspace(-100, 100, head.in_features).to(head.weight.dtype)[None, None]
    kept = getattr(module, base)
    try:
        setattr(module, base, _Known(states))
        module.set_submodule(name, nn.Identity())
        with torch.no_grad():
            logits = module(torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    finally:
        setattr(module, base, kept)
        module.set_submodule(name, head)
    if logits.shape != states.shape or not torch.allclose(logits, states.to(logits.dtype)):
        raise InputError(
            f"model {folder}: {type(module).__name__} changes its logits after the head "
            "(a soft cap or a scale), which RealFlow does not compute"
        )
