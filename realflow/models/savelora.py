"""Writing adapters: directories in peft's format, which `PeftModel.from_pretrained` loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from realflow.files import file_digest, sync
from realflow.graph.types import LoraSpec
from realflow.models.causal import CausalModel
from realflow.models.lora import CONFIG, PREFIX, WEIGHTS, peft_config
from realflow.models.save import CHECKSUMS, replace_directory


def adapters_folder(saved: Path, spec: LoraSpec) -> Path:
    """Where a saved model (its folder in a checkpoint) has its adapters: there, or below merged weights."""
    return saved / "adapters" if spec.save == "merged" else saved


def save_adapters(model: CausalModel, tokenizer: Any, directory: Path) -> dict[str, str]:
    """Save a model's adapters, as it computes with them, and the tokenizer (None: no tokenizer).

    All ranks of the first data-parallel replica call it together; others may, and do nothing. The replica's
    first rank writes, beside the directory and renamed into place at the end, and gets the sha256 of each
    file by its name; others get nothing.
    """
    place = model.place
    if place.dp.index != 0:
        return {}
    whole = _gathered(model)
    if place.replica.index != 0:
        return {}
    assert model.adapters is not None
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tensors = {PREFIX + name: tensor for name, tensor in whole.items()}
        save_file(tensors, partial / WEIGHTS, {"format": "pt"})
        found = peft_config(model.adapters.cut, str(model.source)).to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}
        (partial / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        sums = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
        (partial / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        for name in (*sums, CHECKSUMS):
            sync(partial / name)
        sync(partial)
        replace_directory(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**sums, CHECKSUMS: file_digest(directory / CHECKSUMS)}


def _gathered(model: CausalModel) -> dict[str, torch.Tensor]:
    """Every adapter whole, on the CPU of the replica's first rank; nothing on the others."""
    adapters, axis = model.adapters, model.place.replica
    assert adapters is not None, "a model without adapters"
    cut, whole = adapters.cut, {}
    ranks = [(pp, tp) for pp in range(cut.base.pp) for tp in range(cut.base.tp)]  # in the replica's order
    for sender, (pp, tp) in enumerate(ranks):
        for name, box in cut.boxes(pp, tp).items():
            if tp > 0 and cut.is_whole(name):
                continue
            part = _part(model, name, [stop - start for start, stop in box], sender)
            if axis.index == 0:
                if name not in whole:
                    whole[name] = torch.empty(cut.shapes[name], dtype=model.dtype)
                whole[name][tuple(slice(*span) for span in box)] = part.to("cpu")
    return whole


def _part(model: CausalModel, name: str, shape: list[int], sender: int) -> torch.Tensor:
    """What rank `sender` of the replica has of an adapter, on the first rank; of no use elsewhere."""
    adapters, axis = model.adapters, model.place.replica
    assert adapters is not None
    part = adapters.flat.view(name) if axis.index == sender else adapters.flat.storage.new_empty(shape)
    if sender == 0 or axis.index not in (0, sender):
        return part
    if axis.index == sender:
        dist.send(part.contiguous(), axis.ranks[0], group=axis.group)
    else:
        dist.recv(part, axis.ranks[sender], group=axis.group)
    return part
