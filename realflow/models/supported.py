"""What of a Hugging Face module RealFlow cannot run, found on a module without memory: part of its card."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

ATTENTION_KINDS = {"full_attention", "sliding_attention"}


def body_problem(module: PreTrainedModel) -> str:
    """Why no call can use the causal language model `module`, whatever its head; empty where all can.

    Packed sequences may meet in attention alone, which keeps them apart and is RealFlow's own; weights
    must be plain, and stored as the module has them.
    """
    name = type(module).__name__
    if getattr(module.config, "quantization_config", None) is not None:
        return "its weights are quantized; expected plain floating-point ones"
    if not module._supports_attention_backend:
        return f"{name} does not take an attention function of another library"
    kinds = set(getattr(module.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_KINDS
    mixing = next((type(part).__name__ for part in module.modules() if isinstance(part, nn.Conv1d)), None)
    if kinds or mixing:
        return (
            f"{name} has layers of the kind {mixing or sorted(kinds)[0]}, which mix the tokens of packed "
            "sequences; expected full and sliding-window attention only"
        )
    return _stored_otherwise(module)


def head_problem(module: PreTrainedModel) -> str:
    """Why the language-model head cannot be used; empty where it can.

    Logits must be `head @ hidden` alone: soft caps and scales of logits are not computed here. The
    model's own forward is run with known hidden states in place of its base and a head that hands
    them on: whatever it does to its logits shows.
    """
    head, base = module.get_output_embeddings(), module.base_model_prefix
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return "expected a linear head without bias"
    name = next(key for key, part in module.named_modules() if part is head)
    states = torch.linspace(-100, 100, head.in_features).to(head.weight.dtype)[None, None]
    kept = getattr(module, base, None)
    if kept is None:
        return f"{type(module).__name__} has no base model below its head"
    try:
        setattr(module, base, _Known(states))
        module.set_submodule(name, nn.Identity())
        with torch.no_grad():
            logits = module(torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    except (AttributeError, TypeError) as error:  # it wants more of its base than the last hidden states
        return f"{type(module).__name__} is not a base model and a head after it ({error})"
    finally:
        setattr(module, base, kept)
        module.set_submodule(name, head)
    if logits.shape != states.shape or not torch.allclose(logits, states.to(logits.dtype)):
        return (
            f"{type(module).__name__} changes its logits after the head (a soft cap or a scale), "
            "which RealFlow does not compute"
        )
    return ""


def _stored_otherwise(module: PreTrainedModel) -> str:
    """Checkpoints whose tensors `transformers` renames or joins as it reads them, such as experts."""
    changes = [
        change.reverse_transform() for change in get_model_conversion_mapping(module, add_legacy=False)
    ]
    for name, _ in module.named_parameters():
        if any(change.rename_source_key(name)[1] is not None for change in changes):
            return (
                f"{type(module).__name__} stores {name} under other names or in other shapes (as mixtures of "
                "experts do), which RealFlow does not read"
            )
    return ""


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
