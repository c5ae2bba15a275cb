"""Writing checkpoints: Hugging Face directories that load with `from_pretrained` alone.

Each file holds parameters of one stage; its writer, one of the stage's tensor ranks, gathers their
boxes from the others. So no rank holds more than a file beside its own part.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from realflow.files import file_digest, sync
from realflow.models.causal import CausalModel
from realflow.models.checkpoint import INDEX, WEIGHTS
from realflow.models.partition import Partition
from realflow.models.place import Axis

CHECKSUMS = "checksums.json"

FILE_BYTES = 4 * 2**30
"""A file holds at most this much, unless a single parameter is larger."""


@dataclass(frozen=True)
class SavedFile:
    """Parameters that one file holds, written by tensor rank `tp` of a stage."""

    name: str
    stage: int
    tp: int
    parameters: tuple[str, ...]


def save_model(
    model: CausalModel, tokenizer: Any, directory: Path, *, file_bytes: int = FILE_BYTES
) -> dict[str, str]:
    """Save the compute weights (adapters merged in) and the tokenizer (None: no tokenizer) as `directory`.

    All ranks of the first data-parallel replica call it together, with one file system; others may, and
    do nothing. Everything is written beside the directory and renamed into place at the end, so that
    it is either whole or absent; one that exists is replaced. The replica's first rank gets the sha256
    of each file by its name (`checksums.json` holds them too, but for its own), others get nothing.
    (Float32 masters belong to the training state, not here.)
    """
    place = model.place
    if place.dp.index != 0:
        return {}
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    is_first = place.replica.index == 0
    try:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _meet(model)
        files = saved_files(model.partition, model.dtype.itemsize, file_bytes)
        digests = torch.zeros(len(files), 32, dtype=torch.int32)
        for number, file in enumerate(files):
            if file.stage == place.pp.index and _write(model, file, partial):
                digests[number] = torch.tensor(list(bytes.fromhex(file_digest(partial / file.name))))
        sums = _all_digests(model, files, digests)
        if is_first:
            sums = _finish(model, tokenizer, partial, files, sums)
            replace_directory(partial, directory)
        _meet(model)
    finally:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
    return sums if is_first else {}


def saved_files(partition: Partition, itemsize: int, limit: int) -> tuple[SavedFile, ...]:
    """Which parameters go into which file, each into one, of at most `limit` bytes where that can be.

    The files of a stage are dealt to its tensor ranks.
    """
    sizes = {p.name: p.size * itemsize for p in partition.card.parameters}
    runs: list[tuple[int, int, list[str]]] = []
    done: set[str] = set()
    for stage in range(partition.pp):
        names = [name for name in partition.boxes(stage, 0) if name not in done]
        done.update(names)
        filled = 0
        for name in names:
            if name == names[0] or filled + sizes[name] > limit:
                count = sum(run[0] == stage for run in runs)
                runs.append((stage, count % partition.tp, []))
                filled = 0
            filled += sizes[name]
            runs[-1][2].append(name)
    if len(runs) == 1:
        return (SavedFile(WEIGHTS, *runs[0][:2], tuple(runs[0][2])),)
    return tuple(
        SavedFile(f"model-{number:05d}-of-{len(runs):05d}.safetensors", stage, tp, tuple(names))
        for number, (stage, tp, names) in enumerate(runs, 1)
    )


def replace_directory(new: Path, target: Path) -> None:
    """Rename `new` to `target`, replacing a directory that is there."""
    if target.exists():
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old)
    else:
        new.rename(target)
    sync(target.parent)


def _write(model: CausalModel, file: SavedFile, folder: Path) -> bool:
    """Gather a file's parameters on its writer, which saves them; whether this rank is that one."""
    axis = model.place.tp
    whole = {name: _gather(model, name, axis, file.tp) for name in file.parameters}
    if axis.index != file.tp:
        return False
    path = folder / file.name
    save_file({name: tensor for name, tensor in whole.items() if tensor is not None}, path, {"format": "pt"})
    sync(path)
    return True


def _gather(model: CausalModel, name: str, axis: Axis, writer: int) -> torch.Tensor | None:
    """The whole parameter, on the CPU of tensor rank `writer`; None on the others."""
    mine = model.weight(name)
    if model.partition.is_whole(name):
        return mine.detach().to("cpu", copy=True) if axis.index == writer else None
    if axis.index != writer:
        dist.send(mine, axis.ranks[writer], group=axis.group)
        return None
    shape = next(p.shape for p in model.partition.card.parameters if p.name == name)
    whole = torch.empty(shape, dtype=model.dtype)
    for index, rank in enumerate(axis.ranks):
        box = model.partition.boxes(model.place.pp.index, index)[name]
        part = mine
        if index != writer:
            part = mine.new_empty([stop - start for start, stop in box])
            dist.recv(part, rank, group=axis.group)
        whole[tuple(slice(*span) for span in box)] = part.to("cpu")
    return whole


def _finish(
    model: CausalModel, tokenizer: Any, folder: Path, files: Sequence[SavedFile], sums: dict[str, str]
) -> dict[str, str]:
    """Write what is no weight; returns the digests of all files."""
    module = model.module
    config = copy.deepcopy(module.config)
    config.architectures, config.dtype = [type(module).__name__], model.dtype
    config.save_pretrained(folder)
    if module.can_generate() and module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if len(files) > 1:
        size = sum(p.size for p in model.partition.card.parameters) * model.dtype.itemsize
        weight_map = {name: file.name for file in files for name in file.parameters}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    others = [path for path in sorted(folder.iterdir()) if path.name not in sums]
    sums = dict(sorted({**sums, **{path.name: file_digest(path) for path in others}}.items()))
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    for path in [*others, folder / CHECKSUMS, folder]:
        sync(path)
    return {**sums, CHECKSUMS: file_digest(folder / CHECKSUMS)}


def _all_digests(model: CausalModel, files: Sequence[SavedFile], digests: torch.Tensor) -> dict[str, str]:
    """Every file's sha256, each known to its writer alone before. Returns once all are written."""
    axis = model.place.replica
    digests = digests.to(model.device)
    if axis.size > 1:
        dist.all_reduce(digests, group=axis.group)
    return {file.name: bytes(row).hex() for file, row in zip(files, digests.tolist(), strict=True)}


def _meet(model: CausalModel) -> None:
    """Go on when all ranks of the replica are here."""
    axis = model.place.replica
    if axis.size > 1:
        dist.all_reduce(torch.zeros(1, device=model.device), group=axis.group)
