"""Tables for the kernels of `csrc/move.h`, and their calls: packing, unpacking, copying, checksums.

One call moves any number of strided pieces between any number of tensors, converts numbers on the
way (float64, float32 and bfloat16) and can average them into what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from realflow.errors import InputError, RunError
from realflow.kernels import operators

KINDS = {torch.float64: 1, torch.float32: 2, torch.bfloat16: 3}
"""Dtypes that can be converted and averaged. Others are copied, as bytes."""
COLUMNS = 14


@dataclass(frozen=True)
class Side:
    """Where a piece lies on one side of a move. `offset` and `strides` are in bytes.

    `base` is the index of the tensor among the sources or destinations of the call.
    """

    base: int
    offset: int
    strides: tuple[int, ...]
    dtype: torch.dtype


Row = tuple[int, ...]
"""One row of a table: the fields of `Piece` in `csrc/move.h`."""


def contiguous(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a tensor without gaps."""
    strides: list[int] = []
    step = itemsize
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def rows(shape: Sequence[int], source: Side, destination: Side, blended: bool = False) -> Iterator[Row]:
    """The table rows that move a piece of that shape; one for the usual cuts of a tensor.

    Dims that follow on from one another on both sides are joined first, so that what is contiguous
    on both sides is one row, and a cut of a matrix by columns many rows of one piece. Raises InputError
    for dtypes that cannot be converted.
    """
    same = source.dtype == destination.dtype and not blended
    if not same and not {source.dtype, destination.dtype} <= KINDS.keys():
        what = "averaged" if source.dtype == destination.dtype else "converted"
        raise InputError(
            f"{source.dtype} cannot be {what} to {destination.dtype} on the way; expected float64, float32 "
            "or bfloat16"
        )
    kinds = (0, 0) if same else (KINDS[source.dtype], KINDS[destination.dtype])
    if 0 in shape:
        return
    sizes = source.dtype.itemsize, destination.dtype.itemsize
    dims: list[tuple[int, int, int]] = []  # (length, step in the source, step in the destination)
    for length, one, other in zip(shape, source.strides, destination.strides, strict=True):
        if length == 1:
            continue
        if dims and dims[-1][1:] == (one * length, other * length):
            dims[-1] = (dims[-1][0] * length, one, other)
        else:
            dims.append((length, one, other))
    row = 1
    if dims and dims[-1][1:] == sizes:
        row = dims.pop()[0]
    inner = dims.pop() if dims else (1, 0, 0)
    outer = dims.pop() if dims else (1, 0, 0)
    if same:
        row *= sizes[0]
    for places in product(*(range(length) for length, _, _ in dims)):
        there = source.offset + sum(place * dim[1] for place, dim in zip(places, dims, strict=True))
        here = destination.offset + sum(place * dim[2] for place, dim in zip(places, dims, strict=True))
        yield (
            *(source.base, there, outer[1], inner[1]),
            *(destination.base, here, outer[2], inner[2]),
            *(outer[0], inner[0], row, *kinds, int(blended)),
        )


def table(found: Sequence[Row]) -> torch.Tensor:
    """The rows as the kernels take them: int64 [n, 14]."""
    return torch.tensor(found, dtype=torch.int64).view(-1, COLUMNS)


def move(
    sources: Sequence[torch.Tensor],
    moves: torch.Tensor,
    destinations: Sequence[torch.Tensor],
    decay: float = 0.0,
) -> None:
    """Carry out a table; all tensors must be on one device.

    Averaged pieces become `decay * there + (1 - decay) * new`. Raises RunError where the kernels
    have not been built for the device.
    """
    if not moves.numel():
        return
    try:
        operators().move(list(sources), moves, list(destinations), decay)
    except NotImplementedError as error:
        device = destinations[0].device.type
        raise RunError(
            f"the compiled kernels (realflow._C) are not built for {device}; build RealFlow where torch has "
            f"{device} and its compiler is found"
        ) from error


def checksums(buffer: torch.Tensor, bounds: Sequence[int]) -> list[int]:
    """64 bits for each range `[bounds[i], bounds[i + 1])` of a buffer (uint8 [n]).

    Each depends on every byte of its range and on the byte's place.
    """
    found: list[int] = operators().checksums(buffer, torch.tensor(bounds, dtype=torch.int64)).tolist()
    return found
