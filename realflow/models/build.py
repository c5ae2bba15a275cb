"""A Hugging Face module without memory for its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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

HEADS = ("lm", "value", "reward")


def build_module(folder: Path, dtype: torch.dtype, head: str) -> PreTrainedModel:
    """The module of a model folder's config, in evaluation mode, its large tensors on the meta device.

    `head` is `lm` (a causal language model), or `value` or `reward` (a sequence classifier with one
    number). Buffers that no checkpoint holds, such as rotary frequencies, are as `from_pretrained`
    makes them. Raises InputError for what `transformers` cannot build.
    """
    attention.register()
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if head != "lm":
            config.num_labels = 1
        with _Hollow():
            module: PreTrainedModel = auto.from_config(
                config, dtype=dtype, attn_implementation=attention.NAME
            ).eval()
        if module.can_generate() and (folder / "generation_config.json").is_file():
            module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        raise InputError(f"model {folder}: {error}") from error
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if lost:
        raise InputError(
            f"model {folder}: {type(module).__name__} has the buffer {lost[0]}, left without a value"
        )
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
