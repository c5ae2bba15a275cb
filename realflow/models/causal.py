"""A Hugging Face causal language model on packed sequences and one flat parameter buffer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from realflow.errors import InputError
from realflow.models import attention
from realflow.models.flat import FlatBuffer, flatten
from realflow.models.sharing import Shared, find_shared

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class CausalModel:
    """`module` is the `transformers` model in evaluation mode (no dropout), its parameters being
    views of `flat`. `source` is the checkpoint that it was loaded from. With `share`, beginnings that
    packed sequences have in common are computed once."""

    module: PreTrainedModel
    flat: FlatBuffer
    source: Path
    share: bool = True

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.module.config

    @property
    def dtype(self) -> torch.dtype:
        """That of the compute weights."""
        return self.flat.storage.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.flat.storage.device

    @property
    def head(self) -> torch.nn.Linear:
        """The language-model head."""
        head = self.module.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        return head

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Final hidden states [T, H] (after the last norm) of packed sequences.

        `tokens` and `positions` are int64 [T], `cu_seqlens` int32 [S + 1] on the CPU.
        """
        if self.config._attn_implementation != attention.NAME:  # another engine has switched it
            self.module.set_attn_implementation(attention.NAME)
        shared = find_shared(tokens.cpu(), cu_seqlens) if self.share else None
        if shared is not None:
            tokens, positions = shared.distinct(tokens.cpu()), shared.distinct(positions)
            shared = Shared(shared.keep.to(self.device), shared.spread.to(self.device))
        output = self.module.base_model(
            input_ids=tokens.to(self.device)[None],
            position_ids=positions.to(self.device)[None],
            use_cache=False,
            packing=attention.Packing.of(cu_seqlens, self.device, shared),
        )
        states: torch.Tensor = output.last_hidden_state[0]
        return states if shared is None else shared.repeat(states)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, V] in the compute dtype, for hidden states [R, H]."""
        return self.head(rows)


def load_model(path: Path, *, dtype: str, device: str | torch.device = "cpu") -> CausalModel:
    """Load a checkpoint directory (local files, safetensors) for training, inference and generation.

    `dtype` is bfloat16, float32 or float64. Float64 is for proofs and shares no beginnings: the
    modules' norms compute in float32 whatever the dtype, so that there the order of a sum shows at
    5e-8, and which tokens are shared depends on the layout. Raises InputError where the directory,
    the checkpoint or the kind of model cannot be used.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    module = _read(Path(path), DTYPES[dtype])
    target = torch.device(device)
    module = module.to(target).eval()
    flat = flatten(module, DTYPES[dtype], target)
    model = CausalModel(module, flat, Path(path), share=dtype != "float64")
    _check_head(model)
    return model


def master_values(model: CausalModel, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Elements `[start, stop)` of the flat buffer in `dtype` (float32 or float64), as precise as the
    checkpoint has them: where it was stored wider than the compute dtype it is read again.
    """
    if stored_dtypes(model.source) <= {model.dtype}:
        return model.flat.storage[start:stop].to(dtype, copy=True)
    values = torch.zeros(stop - start, dtype=dtype, device=model.device)
    parameters = dict(_read(model.source, dtype).named_parameters())
    position = {name: slot.offset - start for name, slot in model.flat.slots.items()}
    for name, first, last in model.flat.pieces(start, stop):
        piece = parameters[name].detach().reshape(-1)[first:last]
        values[position[name] + first : position[name] + last] = piece.to(values.device)
    return values


def stored_dtypes(path: Path) -> set[torch.dtype]:
    """The dtypes of the tensors in a checkpoint's safetensors files (headers only)."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found: set[torch.dtype] = set()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        found |= {names[kind] for kind in kinds if kind in names}
    return found


def _read(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise InputError(
            f"model {path}: expected a directory with config.json and *.safetensors "
            "(`realflow models` lists and fetches models)"
        )
    attention.register()
    try:
        module, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention.NAME,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"model {path}: {error}") from error
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:
        raise InputError(f"model {path}: the checkpoint lacks {len(missing)} tensors, such as {missing[0]}")
    if not module._supports_attention_backend:
        raise InputError(
            f"model {path}: {type(module).__name__} does not take an attention function of another library"
        )
    return module


def _check_head(model: CausalModel) -> None:
    """Logits must be `head @ hidden` alone: soft caps and scales of logits are not computed here."""
    head = model.module.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise InputError(f"model {model.source}: expected a linear head without bias")
    token = torch.zeros(1, dtype=torch.int64, device=model.device)
    one = torch.tensor([0, 1], dtype=torch.int32)
    with torch.no_grad():
        ours = model.logits(model.hidden(token, token, one))
        packing = attention.Packing.of(one, model.device)
        whole = model.module(token[None], position_ids=token[None], use_cache=False, packing=packing)
        theirs = whole.logits[0]
    if not torch.allclose(ours, theirs.to(ours.dtype)):
        raise InputError(
            f"model {model.source}: {type(model.module).__name__} changes its logits after the head "
            "(a soft cap or a scale), which RealFlow does not compute"
        )
