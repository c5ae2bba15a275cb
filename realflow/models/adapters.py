"""Which low-rank adapters a cut model has, and which part of each a rank holds. Pure: no torch.

A linear layer W [out, in] with an adapter computes with W + scale B A, A [rank, in] and B [out, rank]
(Hu et al., arXiv 2106.09685). Over tensor ranks A has the columns of W that the
rank holds, B the rows:

    W cut along its rows (column-parallel)      A whole               B the same rows
    W cut along its columns (row-parallel)      A the same columns    B whole
    W whole (shared key and value heads)        A whole               B whole

What a rank holds whole, it has but a part of the gradient of: of A from its own rows of B, of B from its own
columns of A, of shared heads from its own query heads. These parts are summed over tp once a step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from realflow.errors import InputError, Problem
from realflow.graph.types import LoraSpec
from realflow.layout import Box
from realflow.models.card import Card, Parameter
from realflow.models.partition import Partition, module_of

A, B = ".lora_A.weight", ".lora_B.weight"
"""What the names of an adapter's two parameters have after that of their layer: those of peft's files."""

_INSIDE = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class AdapterCut:
    """The adapters of a model that is cut as `base` says. Every box of an adapter follows from that of its
    layer's weight; the methods are those of `Partition`."""

    base: Partition
    spec: LoraSpec

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The linear layers that have an adapter, such as `model.layers.0.mlp.up_proj`; the card's order."""
        return tuple(p.name.removesuffix(".weight") for p in _weights(self.base.card, self.spec))

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The full shapes of all adapters."""
        found: dict[str, tuple[int, ...]] = {}
        for parameter in _weights(self.base.card, self.spec):
            layer, (rows, columns) = parameter.name.removesuffix(".weight"), parameter.shape
            found |= {layer + A: (self.spec.rank, columns), layer + B: (rows, self.spec.rank)}
        return found

    @property
    def size(self) -> int:
        """Number of elements of all adapters."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def boxes(self, pp: int, tp: int) -> dict[str, Box]:
        """The boxes that the rank at (pp, tp) holds."""
        held, whole = self.base.boxes(pp, tp), (0, self.spec.rank)
        found: dict[str, Box] = {}
        for layer in self.layers:
            if f"{layer}.weight" in held:
                rows, columns = held[f"{layer}.weight"]
                found[layer + A], found[layer + B] = (whole, columns), (rows, whole)
        return found

    def is_whole(self, name: str) -> bool:
        """Whether every tensor rank holds all of a parameter."""
        layer, dim = (name.removesuffix(A), 1) if name.endswith(A) else (name.removesuffix(B), 0)
        return self.base.cut_dim(f"{layer}.weight") != dim

    def partial(self, *, sequence: bool = False) -> tuple[str, ...]:
        """Parameters, sorted, that every tensor rank holds whole but has a part of the gradient of: all that
        are whole. (`sequence` changes nothing: between the blocks there are no adapters.)"""
        if self.base.tp == 1:
            return ()
        return tuple(sorted(name for name in self.shapes if self.is_whole(name)))

    @property
    def tied(self) -> tuple[str, ...]:
        """None: each adapter is on one stage."""
        return ()


def adapter_cut(base: Partition, spec: LoraSpec) -> AdapterCut:
    """The adapters of a model. Raises InputError for targets that are no linear layers of its blocks."""
    problem = target_problem((p.name for p in _linear(base.card)), spec)
    if problem:
        raise InputError(Problem(f"{base.card.architecture}: {problem}", where="lora.targets"))
    return AdapterCut(base, spec)


def target_problem(names: Iterable[str], spec: LoraSpec) -> str:
    """What is wrong with the targets for the linear layers whose weights have these names; or nothing."""
    known = sorted({module_of(name) for name in names})
    missing = [target for target in spec.targets if target not in known]
    if not missing and known:
        return ""
    lacks = (
        f"its blocks have no linear layer {' or '.join(missing)}" if missing else "it has no linear layers"
    )
    return f"{lacks}; expected some of {', '.join(known)}" if known else lacks


def _linear(card: Card) -> list[Parameter]:
    """The weights of the linear layers of a model's blocks."""
    return [p for p in card.parameters if is_linear(p.name, p.shape)]


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the weight of a linear layer of a block."""
    return len(shape) == 2 and name.endswith(".weight") and _INSIDE.search(name) is not None


def _weights(card: Card, spec: LoraSpec) -> list[Parameter]:
    """Those that have an adapter."""
    return [p for p in _linear(card) if not spec.targets or module_of(p.name) in spec.targets]
