"""Packed batches: samples one after the other in one dimension, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from realflow.graph.types import Dtype, Extent

_TORCH = {"int": torch.int64, "bool": torch.bool}


@dataclass(frozen=True)
class Batch:
    """Samples packed along the first dim.

    `lengths` (int64 [S]) counts each sample's tokens, T in all. In `fields` a token field is a
    tensor [T, ...], a numeric sample field a tensor [S], a text or any field a list of S values.
    """

    ids: tuple[int, ...]
    lengths: torch.Tensor
    fields: Mapping[str, Any]

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 [S + 1]: where each sample starts; the last entry is T."""
        total = torch.zeros(len(self.ids) + 1, dtype=torch.int32)
        torch.cumsum(self.lengths, 0, dtype=torch.int32, out=total[1:])
        return total

    @property
    def positions(self) -> torch.Tensor:
        """int64 [T]: each token's place in its own sample."""
        starts = torch.repeat_interleave(self.cu_seqlens[:-1].long(), self.lengths)
        return torch.arange(int(self.lengths.sum())) - starts


def pack(
    ids: Sequence[int],
    lengths: Sequence[int],
    values: Mapping[str, Sequence[Any]],
    extents: Mapping[str, Extent],
    dtypes: Mapping[str, Dtype],
) -> Batch:
    """Pack per-sample values (one entry of each field for each id) into a `Batch`.

    A numeric field's None (a missing value) becomes NaN; functions that take missing values say so.
    """
    packed: dict[str, Any] = {}
    for name, column in values.items():
        assert len(column) == len(ids), (name, len(column), len(ids))
        if extents[name] == "token":
            packed[name] = torch.cat(list(column)) if column else torch.zeros(0)
        elif dtypes[name] in _TORCH:
            packed[name] = torch.tensor(list(column), dtype=_TORCH[dtypes[name]])
        elif dtypes[name] == "float":
            numbers = [float("nan") if value is None else float(value) for value in column]
            packed[name] = torch.tensor(numbers, dtype=torch.float64)
        else:
            packed[name] = list(column)
    return Batch(tuple(ids), torch.tensor(list(lengths), dtype=torch.int64), packed)


def unpack(value: Any, lengths: Sequence[int], extent: Extent) -> list[Any]:
    """The entries of one packed field, one for each sample (see `pack`)."""
    if extent == "token":
        return list(torch.split(value, list(lengths)))
    return value.tolist() if isinstance(value, torch.Tensor) else list(value)


def to_tokens(value: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Repeat a sample field [S] over each sample's tokens: [T]."""
    return torch.repeat_interleave(value, lengths)
