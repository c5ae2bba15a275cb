"""Packing strided views into a flat byte buffer and back, with the kernels of `csrc/pack.cpp`.

On the CPU one call of the kernel copies all pieces with all threads. Views on another device are
copied one by one by torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from itertools import product

import torch

from realflow.errors import RunError

Run = tuple[int, int, int, int]
"""Byte offset of the first row, rows, bytes of a row, bytes from row to row."""


def runs(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> list[Run]:
    """The contiguous rows of a strided view in row-major order, offsets from its first element.

    `strides` count elements, as in torch. Dims that follow on from one another are joined first, so
    that a contiguous view is one row, and a cut of a matrix by columns one run of many rows.
    """
    if 0 in shape:
        return []
    dims: list[tuple[int, int]] = []  # (length, stride in bytes), outermost first
    for length, stride in zip(shape, strides, strict=True):
        if length == 1:
            continue
        if dims and dims[-1][1] == stride * itemsize * length:
            dims[-1] = (dims[-1][0] * length, stride * itemsize)
        else:
            dims.append((length, stride * itemsize))
    row = itemsize
    if dims and dims[-1][1] == itemsize:
        row = dims.pop()[0] * itemsize
    rows, step = dims.pop() if dims else (1, row)
    offsets = product(*(range(0, length * stride, stride) for length, stride in dims))
    return [(sum(offset), rows, row, step) for offset in offsets]


def pack(views: Sequence[torch.Tensor], buffer: torch.Tensor) -> int:
    """Copy `views` (any shapes, strides and dtypes) into `buffer` (uint8 [n]) without gaps.

    Returns the bytes written; both must be on one device. Raises RunError where the kernels have
    not been built.
    """
    if buffer.device.type != "cpu":
        return pack_each(views, buffer)
    table, total = _table(views)
    _operators().pack(list(views), table, buffer)
    return total


def unpack(buffer: torch.Tensor, views: Sequence[torch.Tensor]) -> int:
    """Copy `buffer` (uint8 [n]), as `pack` filled it, into `views`. Returns the bytes read."""
    if buffer.device.type != "cpu":
        return unpack_each(buffer, views)
    table, total = _table(views)
    _operators().unpack(buffer, table, list(views))
    return total


def pack_each(views: Sequence[torch.Tensor], buffer: torch.Tensor) -> int:
    """`pack` by one torch copy for each view, on any device."""
    at = 0
    for view in views:
        # A fresh clone has plain strides, which a view as bytes requires even of one element.
        data = view.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        buffer[at : at + data.numel()].copy_(data)
        at += data.numel()
    return at


def unpack_each(buffer: torch.Tensor, views: Sequence[torch.Tensor]) -> int:
    """`unpack` by one torch copy for each view, on any device."""
    at = 0
    for view in views:
        size = view.numel() * view.element_size()
        # A clone starts at an address that any dtype may be read from; `at` need not.
        view.copy_(buffer[at : at + size].clone().view(view.dtype).view(view.shape))
        at += size
    return at


def checksum(tensor: torch.Tensor) -> int:
    """64 bits that depend on every byte and its place (row-major, whatever the strides)."""
    data = tensor.detach().cpu().contiguous()
    return int(_operators().checksum(data))


def _table(views: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The kernel's table (see `csrc/pack.h`), int64 [n, 6], and the packed size in bytes."""
    rows: list[tuple[int, int, int, int, int, int]] = []
    packed = 0
    for index, view in enumerate(views):
        for offset, count, size, step in runs(view.shape, view.stride(), view.element_size()):
            rows.append((index, offset, count, size, step, packed))
            packed += count * size
    return torch.tensor(rows, dtype=torch.int64).view(-1, 6), packed


@cache
def _operators() -> torch._ops._OpNamespace:
    """`torch.ops.realflow`, its library loaded at the first use."""
    spec = importlib.util.find_spec("realflow._C")
    if spec is None or spec.origin is None:
        raise RunError(
            "the compiled kernels (realflow._C) are not built; run `make setup`, or `pip install -e .` "
            "with a C++ compiler at hand"
        )
    torch.ops.load_library(spec.origin)
    return torch.ops.realflow
