"""Tensor parallelism on plain tensors: where a cut model communicates.

A block (attention, MLP) has column-parallel layers that read its input and one row-parallel layer
that makes its output; each tensor rank computes its own heads or columns, and its output is one
term of a sum:

                       forward                       backward
    block's input      (nothing)                     all-reduce
    block's output     all-reduce                    (nothing)
    with sequence parallelism:
    block's input      all-gather along tokens       reduce-scatter
    block's output     reduce-scatter along tokens   all-gather

With sequence parallelism what lies between the blocks (norms, residuals) is divided along the
tokens: rank i of t has rows [i c, (i + 1) c) of the rows padded with zeros to t c, c = ceil(rows / t).
Padding never reaches a block or a head, and its gradients are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from realflow.models.place import Axis


@dataclass
class Region:
    """The tensor ranks of a model. `sequence` (settable) is sequence parallelism; `rows` the number of
    rows of the pass under way, which a block's input does not tell under sequence parallelism."""

    axis: Axis
    sequence: bool = False
    rows: int = 0

    def share(self, rows: int) -> int:
        """How many of `rows` rows, padding included, a rank has between the blocks."""
        return -(-rows // self.axis.size) if self.sequence else rows

    @contextmanager
    def passing(self, rows: int, *, sequence: bool) -> Iterator[None]:
        """A pass of `rows` rows, also a repeated one in the midst of another pass's backward."""
        before = self.rows, self.sequence
        self.rows, self.sequence = rows, sequence
        try:
            yield
        finally:
            self.rows, self.sequence = before

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """A block's input [..., share, H] -> [..., rows, H], the same on every tensor rank.

        Its gradient is summed over the ranks: each has the part of its own heads or columns.
        """
        if self.axis.size == 1:
            return x
        if not self.sequence:
            return _apply(_Copy, x, self.axis)
        return _apply(_Gather, x, self.axis, self.rows, True)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """A block's output, terms [..., rows, H] -> their sum over the ranks, [..., share, H]."""
        if self.axis.size == 1:
            return x
        return _apply(_Scatter if self.sequence else _Sum, x, self.axis)

    def whole(self, x: torch.Tensor, *, partial_gradient: bool) -> torch.Tensor:
        """What lies between blocks, [..., share, H] -> [..., rows, H] for a head.

        `partial_gradient`: the head is cut, so that each rank brings a part of the gradient; a head
        that every rank has whole brings all of it.
        """
        if partial_gradient:
            return self.enter(x)
        if self.axis.size == 1 or not self.sequence:
            return x
        return _apply(_Gather, x, self.axis, self.rows, False)


def cut_modules(
    root: nn.Module,
    columns: Sequence[str],
    rows: Sequence[str],
    embeddings: Sequence[tuple[str, int]],
    region: Region,
) -> None:
    """Make the modules of these names, whose parameters are cut, communicate over `region`.

    `columns` and `rows` are column- and row-parallel linear layers, `embeddings` tables with the id
    of their first row.
    """
    for block in sorted({name.rpartition(".")[0] for name in columns}):
        root.get_submodule(block).register_forward_pre_hook(partial(_enter_block, region), with_kwargs=True)
    for name in rows:
        layer: Any = root.get_submodule(name)
        layer.forward = partial(_row_parallel, region, layer)
    for name, first in embeddings:
        table: Any = root.get_submodule(name)
        table.forward = partial(_embed, region, table, table.forward, first)


def sum_adapted_rows(root: nn.Module, rows: Sequence[str], region: Region) -> None:
    """Make the row-parallel layers of these names, each of which has an adapter around it by now, communicate
    where the adapter's part of the product has been added: one sum over the ranks for both."""
    for name in rows:
        adapted: Any = root.get_submodule(name)
        layer = adapted.base_layer
        layer.forward = partial(_product, layer)
        adapted.forward = partial(_summed_rows, region, adapted.forward, layer)


def _enter_block(
    region: Region, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (region.enter(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": region.enter(kwargs["hidden_states"])}


def _row_parallel(region: Region, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return _summed_rows(region, partial(_product, layer), layer, x)


def _summed_rows(
    region: Region, product: Callable[[torch.Tensor], torch.Tensor], layer: nn.Linear, x: torch.Tensor
) -> torch.Tensor:
    """The sum over the ranks of their columns' products; the bias, which all have, is added once."""
    total = region.leave(product(x))
    return total if layer.bias is None else total + layer.bias


def _product(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight)


def _embed(
    region: Region,
    table: nn.Embedding,
    forward: Callable[[torch.Tensor], torch.Tensor],
    first: int,
    ids: torch.Tensor,
) -> torch.Tensor:
    """Rows of a table cut along the vocabulary; exact, since all terms of the sum but one are zero."""
    local = ids - first
    foreign = (local < 0) | (local >= table.weight.shape[0])
    found = forward(local.masked_fill(foreign, 0))
    return region.leave(found.masked_fill(foreign[..., None], 0))


def _apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*args)
    return result


def _all_gather(x: torch.Tensor, axis: Axis, rows: int) -> torch.Tensor:
    """[..., c, H] of each rank -> [..., rows, H]; leading dims are of size 1."""
    flat = x.reshape(-1, x.shape[-1])
    whole = flat.new_empty(axis.size * len(flat), flat.shape[1])
    dist.all_gather_single(whole, flat.contiguous(), group=axis.group)
    return whole[:rows].reshape(*x.shape[:-2], rows, x.shape[-1])


def _reduce_scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Terms [..., rows, H] -> this rank's c rows of the sum, [..., c, H]."""
    flat = _padded(x, axis)
    mine = flat.new_empty(len(flat) // axis.size, flat.shape[1])
    dist.reduce_scatter_single(mine, flat, group=axis.group)
    return mine.reshape(*x.shape[:-2], *mine.shape)


def _padded(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[..., rows, H] -> [t c, H], zeros at the end."""
    flat = x.reshape(-1, x.shape[-1])
    return F.pad(flat, (0, 0, 0, -len(flat) % axis.size)).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)  # autograd may hand it to others too
        dist.all_reduce(total, group=ctx.axis.group)
        return total, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        assert x.is_contiguous()
        ctx.mark_dirty(x)  # a product's result, which nothing else reads
        dist.all_reduce(x, group=axis.group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, rows: int, summed: bool) -> torch.Tensor:
        ctx.axis, ctx.summed = axis, summed
        return _all_gather(x, axis, rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.summed:
            return _reduce_scatter(grad, ctx.axis), None, None, None
        flat = _padded(grad, ctx.axis)
        mine = flat.view(ctx.axis.size, -1, flat.shape[1])[ctx.axis.index]
        return mine.reshape(*grad.shape[:-2], *mine.shape), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis, ctx.rows = axis, x.shape[-2]
        return _reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_gather(grad, ctx.axis, ctx.rows), None
