"""The global norm of a gradient that many ranks hold parts of, each element counted once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from realflow.engines.shards import Arrangement, Run
from realflow.models.place import Place


def counts(arrangement: Arrangement, place: Place, order: int) -> bool:
    """Whether this rank is the one that counts (and stores) its elements at `order`: what tensor
    ranks hold alike is counted on the first, what both ends hold on the first stage."""
    if order < arrangement.tied:
        return place.is_first
    return order >= arrangement.whole or place.tp.index == 0


def square_sum(tensors: Iterable[torch.Tensor]) -> float:
    """Sum of the squares of 1-D tensors, accumulated in float64. The host waits for a device once."""
    sums = [_square_sum(tensor) for tensor in tensors]
    return float(torch.stack(sums).sum()) if sums else 0.0


def culprits(arrangement: Arrangement, runs: Sequence[Run], gradient: torch.Tensor) -> list[str]:
    """Names of parameters with elements in `runs` of `gradient` that are not finite."""
    found: dict[str, None] = {}
    for run in runs:
        for piece in arrangement.names(run.order, run.order + run.size):
            if not gradient[piece.order : piece.order + piece.last - piece.first].isfinite().all():
                found[piece.name] = None
    return list(found)


def _square_sum(values: torch.Tensor, width: int = 4096) -> torch.Tensor:
    """Sums of rows of `width` elements in the tensor's dtype, their sum in float64: []."""
    whole = len(values) // width * width
    rows = torch.linalg.vector_norm(values[:whole].view(-1, width), dim=1).double()
    rest = torch.linalg.vector_norm(values[whole:].double())
    return rows.square().sum() + rest.square()
