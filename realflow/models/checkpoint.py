"""Reading a checkpoint's tensors by boxes: no rank reads more than it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from realflow.errors import InputError, Problem
from realflow.layout import Box
from realflow.models.card import Card
from realflow.models.fitting import HEAD

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The safetensors files of a model folder (`model.safetensors`, or those that its index names).

    Headers are read at once, tensors on demand.
    """

    def __init__(self, folder: Path) -> None:
        """Raises InputError where the folder or its files cannot be used."""
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise self._refuse("")
        self._files = {path: self._open(path) for path in self._paths()}
        self._where = {key: file for file in self._files.values() for key in file.keys()}  # noqa: SIM118

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The floating-point dtypes of the tensors."""
        kinds = {file.get_slice(key).get_dtype() for key, file in self._where.items()}
        return {_DTYPES[kind] for kind in kinds if kind in _DTYPES}

    @property
    def names(self) -> set[str]:
        """The names of the tensors."""
        return set(self._where)

    def shape(self, key: str) -> tuple[int, ...] | None:
        """That of a tensor, None where there is none of this name."""
        return tuple(self._where[key].get_slice(key).get_shape()) if key in self._where else None

    def read(self, key: str, box: Box) -> torch.Tensor:
        """A box of a tensor, in the dtype that it is stored in."""
        if not box:
            found: torch.Tensor = self._where[key].get_tensor(key)
            return found
        part: torch.Tensor = self._where[key].get_slice(key)[tuple(slice(*span) for span in box)]
        return part

    def _paths(self) -> list[Path]:
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        index = self.folder / INDEX
        if not index.is_file():
            raise self._refuse(f"found neither {WEIGHTS} nor {INDEX}; ")
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(Problem(f"is no index of a checkpoint ({error!r})", file=str(index))) from error
        return [self.folder / name for name in sorted(names)]

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(Problem(f"cannot be read as safetensors ({error})", file=str(path))) from error

    def _refuse(self, reason: str) -> InputError:
        return InputError(
            f"model {self.folder}: {reason}expected a directory with config.json and *.safetensors "
            "(`realflow models` lists and fetches models)"
        )


def stored_names(
    checkpoint: Checkpoint, card: Card, optional: frozenset[str] = frozenset()
) -> Mapping[str, str]:
    """Parameter -> the name of its tensor in the checkpoint, for all parameters of a card.

    A tied parameter may be stored under any of its names, and a checkpoint of the base model leaves
    the base's prefix out. Parameters of `optional` may be missing. Raises InputError for others that
    are, and for tensors of another shape.
    """
    aliases: dict[str, list[str]] = {}
    for alias, owner in card.tied.items():
        aliases.setdefault(owner, []).append(alias)
    found: dict[str, str] = {}
    missing: list[str] = []
    problems: list[Problem] = []
    for parameter in card.parameters:
        names = [parameter.name, *aliases.get(parameter.name, ())]
        names += [name.partition(".")[2] for name in names]
        key = next((name for name in names if checkpoint.shape(name) is not None), None)
        if key is None:
            if parameter.name not in optional:
                missing.append(parameter.name)
            continue
        found[parameter.name] = key
        if checkpoint.shape(key) != parameter.shape:
            shape = list(checkpoint.shape(key) or ())
            asked = "one label needs" if parameter.name == HEAD else "its config asks for"
            problems.append(
                Problem(f"{key} has the shape {shape}; {asked} {list(parameter.shape)}", where="model")
            )
    if missing:
        text = f"the checkpoint lacks {len(missing)} tensors, such as {missing[0]}"
        others = sorted(checkpoint.names - {*found.values()})
        if others:
            text += f" (it has {len(others)} that are not the model's, such as {others[0]})"
        problems.append(Problem(text, where="model"))
    if problems:
        raise InputError([Problem(p.message, where=p.where, file=str(checkpoint.folder)) for p in problems])
    return found
