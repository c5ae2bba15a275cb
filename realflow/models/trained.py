"""What an engine trains of a model: all of its parameters, or its adapters alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from realflow.layout import Box
from realflow.models.flat import Slot


class Cut(Protocol):
    """Who holds what: `realflow.models.partition.Partition`, or `realflow.models.adapters.AdapterCut`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The full shapes of all parameters."""

    @property
    def tied(self) -> tuple[str, ...]:
        """Those that first and last stage both hold."""

    def is_whole(self, name: str) -> bool:
        """Whether every tensor rank holds all of a parameter."""

    def partial(self, *, sequence: bool = False) -> tuple[str, ...]:
        """Those held whole of whose gradient each tensor rank has a part."""


@dataclass(frozen=True, eq=False)
class Trained:
    """The parameters of one rank that are trained.

    `slots` say where they lie in the model's flat buffer, `boxes` which part of each is held here;
    `parameters` are those of the module, views of the buffer.
    """

    cut: Cut
    slots: Mapping[str, Slot]
    boxes: Mapping[str, Box]
    parameters: Mapping[str, nn.Parameter]
