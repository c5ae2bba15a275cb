"""Low-rank adapters on a cut model: peft's layers over views of the flat buffer, merged where weights move.

The modules are peft's own (`peft.inject_adapter_in_model`), so are the initial values and the files. Ours is
that each rank has its boxes of A and B (`realflow.models.adapters`), and that what a row-parallel layer and
its adapter make is summed over tensor ranks once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from realflow.errors import InputError, Problem
from realflow.graph.types import LoraSpec
from realflow.layout import Box, lengths
from realflow.models.adapters import A, AdapterCut, B, adapter_cut
from realflow.models.flat import FlatBuffer
from realflow.models.partition import ROW, Partition
from realflow.models.place import Place
from realflow.models.tensor import Region, sum_adapted_rows

PREFIX = "base_model.model."
"""What names of parameters begin with in peft's files."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_NAME = "default"


@dataclass(frozen=True)
class AdapterSource:
    """Where a model's adapters come from: `folder`, a directory in peft's format, or (None) new ones, drawn
    from `seed`. With `merged` the model has them in its weights, and none beside these."""

    spec: LoraSpec
    seed: int = 1
    folder: Path | None = None
    merged: bool = False

    def __post_init__(self) -> None:
        assert self.folder is not None or not self.merged, "as new they are zero: there is nothing to merge"


@dataclass(frozen=True, eq=False)
class Adapters:
    """A rank's adapters. `flat` has them, in the same storage as the model's weights; `parameters` are those
    of the module."""

    cut: AdapterCut
    flat: FlatBuffer
    parameters: Mapping[str, nn.Parameter]

    def has(self, name: str) -> bool:
        """Whether a weight of the model has an adapter here."""
        return name.removesuffix(".weight") + A in self.flat.slots

    def merge(self, name: str, weight: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """The part [rows, columns] (counted on this rank) of a weight held here, its adapter merged in."""
        layer = name.removesuffix(".weight")
        a, b = self.flat.view(layer + A)[:, columns], self.flat.view(layer + B)[rows]
        return merged(weight[rows, columns], a, b, self.cut.spec.scale)


@torch.no_grad()
def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """`weight` [out, in] + scale `b` [out, rank] `a` [rank, in], computed in float32 (float64 for float64
    weights) and rounded once, to the weight's dtype."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)


def initial(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """An adapter's first values, float32 of its full shape: peft's, A as `torch.nn.Linear` draws it (uniform
    in ±1/√in) and B zeros. A draw depends on `seed` and the parameter's name, not on who holds it."""
    values = torch.zeros(shape, dtype=torch.float32)
    if name.endswith(A):
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values


class _Values:
    """The values of adapters by boxes, drawn or read."""

    def __init__(self, cut: AdapterCut, source: AdapterSource) -> None:
        """Raises InputError where a folder has none, or other ones."""
        self._shapes, self._seed = cut.shapes, source.seed
        self._file = None if source.folder is None else _open(source.folder, cut)

    def box(self, name: str, box: Box) -> torch.Tensor:
        """The box of a parameter."""
        span = tuple(slice(*side) for side in box)
        if self._file is None:
            return initial(name, self._shapes[name], self._seed)[span]
        found: torch.Tensor = self._file.get_slice(PREFIX + name)[span]
        return found


def _open(folder: Path, cut: AdapterCut) -> Any:
    path = folder / WEIGHTS
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(Problem(f"cannot be read as safetensors ({error})", file=str(path))) from error
    there = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    wanted = {PREFIX + name: shape for name, shape in cut.shapes.items()}
    if there != wanted:
        name = min(key for key in {*there, *wanted} if there.get(key) != wanted.get(key))
        raise InputError(
            Problem(
                f"has adapters of another rank or for other layers: {name} has the shape "
                f"{_shape(there.get(name))}, expected {_shape(wanted.get(name))}",
                file=str(path),
            )
        )
    return file


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def adapter_shapes(base: Partition, place: Place, source: AdapterSource | None) -> dict[str, tuple[int, ...]]:
    """The shapes of what a rank holds beside the model's weights."""
    if source is None or source.merged:
        return {}
    boxes = adapter_cut(base, source.spec).boxes(place.pp.index, place.tp.index)
    return {name: lengths(box) for name, box in boxes.items()}


@torch.no_grad()
def load_adapters(
    module: nn.Module, source: AdapterSource, every: FlatBuffer, base: Partition, place: Place, region: Region
) -> Adapters | None:
    """Put adapters on a module that is cut as `base` says, or merge them into its weights (and return None).

    `every` has the weights, and room for the adapters that are not merged. Raises InputError where they
    cannot be read.
    """
    cut = adapter_cut(base, source.spec)
    values, boxes = _Values(cut, source), cut.boxes(place.pp.index, place.tp.index)
    if source.merged:
        for layer in (name.removesuffix(A) for name in boxes if name.endswith(A)):
            weight = every.view(f"{layer}.weight")
            a, b = (values.box(name, boxes[name]).to(weight) for name in (layer + A, layer + B))
            weight.copy_(merged(weight, a, b, source.spec.scale))
        return None
    flat = every.only(boxes)
    for name, box in boxes.items():
        flat.view(name).copy_(values.box(name, box))
    return Adapters(cut, flat, _attach(module, cut, flat, region, base.modules(ROW, place.pp.index)))


def _attach(
    module: nn.Module, cut: AdapterCut, flat: FlatBuffer, region: Region, rows: Sequence[str]
) -> dict[str, nn.Parameter]:
    """Put peft's layers around the linear layers, with views of `flat`; nothing else wants a gradient then.

    `rows` are the row-parallel layers, which are cut already.
    """
    from peft import inject_adapter_in_model  # a while to import, and seldom needed

    inject_adapter_in_model(peft_config(cut), module, adapter_name=_NAME, low_cpu_mem_usage=True)
    parameters: dict[str, nn.Parameter] = {}
    layers = [name.removesuffix(A) for name in flat.slots if name.endswith(A)]
    for layer in layers:
        around: Any = module.get_submodule(layer)
        for suffix, linear in ((A, around.lora_A[_NAME]), (B, around.lora_B[_NAME])):
            linear.weight = parameters[layer + suffix] = nn.Parameter(flat.view(layer + suffix))
    if region.axis.size > 1:
        sum_adapted_rows(module, [name for name in rows if name in layers], region)
    return parameters


class LowRank(NamedTuple):
    """An adapter as it is computed with: x -> scale B A x."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def is_adapted(part: nn.Module) -> bool:
    """Whether a module is a linear layer with an adapter as `load_adapters` makes it."""
    kind, around = type(part), cast(Any, part)
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear"):
        return False  # said without peft, whose import takes a while
    return list(around.lora_A) == [_NAME] and not around.lora_variant


def without_adapter(part: nn.Module) -> tuple[nn.Linear, LowRank | None]:
    """A linear layer, and the adapter that it has."""
    if not is_adapted(part):
        assert isinstance(part, nn.Linear), part
        return part, None
    around: Any = part
    a, b = around.lora_A[_NAME].weight, around.lora_B[_NAME].weight
    return around.base_layer, LowRank(a, b, float(around.scaling[_NAME]))


def peft_config(cut: AdapterCut, base: str | None = None) -> Any:
    """The adapters as peft's `LoraConfig`; `base` is the model that they are for."""
    from peft import LoraConfig

    targets = sorted({layer.rpartition(".")[2] for layer in cut.layers})
    alpha: Any = cut.spec.alpha  # peft names whole numbers, and takes any
    return LoraConfig(
        r=cut.spec.rank,
        lora_alpha=alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=base is not None,
    )
