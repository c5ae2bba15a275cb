"""Training state on disk: a safetensors file for each rank, readable under any layout.

A file holds boxes of full tensors under keys such as `exp_avg|model.norm.weight|0:32`, with the names
and shapes of the checkpoint; what several ranks hold alike is in the file of one of them. A rank reads
the parts of boxes that it needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from realflow.engines.masters import Shard
from realflow.engines.train import TrainEngine
from realflow.errors import InputError
from realflow.files import beside
from realflow.layout import Box, intersect, without
from realflow.models.causal import CausalModel

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Stored:
    """Where a box of a parameter is stored."""

    file: Path
    box: Box

    def key(self, kind: str, name: str) -> str:
        return _key(kind, name, self.box)


def save_state(engine: TrainEngine, directory: Path) -> Path:
    """Write this rank's masters and optimizer moments: see `save_shards`."""
    return save_shards(engine.model, engine.masters.shards(), engine.version, directory)


def load_state(engine: TrainEngine, directory: Path) -> None:
    """Continue from the files of a run of the same model under any layout, on all ranks together.

    Raises InputError, with the engine unchanged, as `load_shards` does.
    """
    engine.loaded(load_shards(engine.model, list(engine.masters.shards()), directory))


def save_shards(model: CausalModel, shards: Iterable[Shard], version: int, directory: Path) -> Path:
    """Write those of this rank's boxes that count; returns the file, whole or not there at all.

    Every rank of the model's mesh does it, into one directory, after `version` steps.
    """
    everyone = model.place.everyone
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"shard-{everyone.index:05d}-of-{everyone.size:05d}.safetensors"
    shapes = {name: list(shape) for name, shape in model.trained.cut.shapes.items()}
    tensors = {
        _key(kind, shard.name, shard.box): tensor.contiguous()
        for shard in shards
        if shard.counted
        for kind, tensor in shard.tensors.items()
    }
    facts = {"version": str(version), "shapes": json.dumps(shapes)}
    with beside(path) as partial:
        save_file(tensors, partial, metadata=facts)
    return path


def load_shards(model: CausalModel, shards: Sequence[Shard], directory: Path) -> int:
    """Fill this rank's boxes from files that were written under any layout; returns their version.

    Raises InputError where files are missing, damaged, of another model or of different versions, or
    do not hold all that this rank needs.
    """
    shapes = model.trained.cut.shapes
    stored, version = _index(directory, shapes)
    for shard in shards:
        missing = without(shard.box, (entry.box for entry in stored.get(shard.name, ())))
        if missing:
            raise InputError(
                f"training state {directory}: {shard.name} {_text(missing[0])} is in none of the files"
            )
    wanted: dict[Path, list[tuple[_Stored, Shard]]] = {}
    for shard in shards:
        for entry in stored[shard.name]:
            if intersect(entry.box, shard.box) is not None:
                wanted.setdefault(entry.file, []).append((entry, shard))
    for path, pairs in wanted.items():
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for entry, shard in pairs:
                _read(file, entry, shard)
    return version


def _index(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, list[_Stored]], int]:
    """Which boxes of each parameter the files hold, and their version."""
    found: dict[str, list[_Stored]] = {}
    versions: set[int] = set()
    paths = sorted(directory.glob("shard-*.safetensors"))
    if not paths:
        raise InputError(f"training state {directory}: no shard-*.safetensors is there")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                facts, keys = file.metadata() or {}, list(file.keys())
            versions.add(int(facts["version"]))
            there = {name: tuple(shape) for name, shape in json.loads(facts["shapes"]).items()}
            entries = [_parse(key) for key in keys]
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"training state {path}: it cannot be read ({error})") from error
        if there != dict(shapes):
            name = min(n for n in {*there, *shapes} if there.get(n) != shapes.get(n))
            raise InputError(
                f"training state {path}: it belongs to a model with other parameters: {name} has shape "
                f"{_shape(there.get(name))}, expected {_shape(shapes.get(name))}"
            )
        for kind, name, box in entries:
            if name not in shapes or len(box) != len(shapes[name]):
                raise InputError(f"training state {path}: {name} {_text(box)} is not part of this model")
            if kind == KINDS[0]:
                found.setdefault(name, []).append(_Stored(path, box))
    if len(versions) != 1:
        raise InputError(
            f"training state {directory}: expected files of one version, found {sorted(versions)}"
        )
    return found, versions.pop()


def _read(file: Any, entry: _Stored, shard: Shard) -> None:
    """Copy what a stored box has of a shard's into the shard's tensors."""
    common = intersect(entry.box, shard.box)
    assert common is not None
    there = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(common, entry.box, strict=True))
    here = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(common, shard.box, strict=True))
    for kind, tensor in shard.tensors.items():
        try:
            piece = file.get_slice(entry.key(kind, shard.name))[there]
        except SafetensorError as error:
            raise InputError(f"training state {entry.file}: it cannot be read ({error})") from error
        if piece.dtype != tensor.dtype:
            raise InputError(
                f"training state {entry.file}: {kind} of {shard.name} is {_dtype(piece)}, expected "
                f"{_dtype(tensor)}: the run computed in another dtype"
            )
        tensor[here].copy_(piece)


def _key(kind: str, name: str, box: Box) -> str:
    return f"{kind}|{name}|{_text(box)}"


def _parse(key: str) -> tuple[str, str, Box]:
    kind, name, text = key.split("|")
    if kind not in KINDS:
        raise ValueError(f"unknown tensor {key!r}")
    box = tuple((int(a), int(b)) for a, b in (part.split(":") for part in text.split(",")))
    return kind, name, box


def _text(box: Box) -> str:
    return ",".join(f"{start}:{stop}" for start, stop in box)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
