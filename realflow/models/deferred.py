"""Weight gradients computed apart from input gradients, as zero-bubble schedules need them.

    with model.deferred.record():      # CausalModel.run does this while `defer` is set
        ...
    states.backward(gradient)          # B: input gradients; linear layers queue their weights' part
    work = model.deferred.take()
    work.run(add)                      # W: add(parameter, gradient) for each weight and bias

The weight gradient of y = x W^T + b is dL/dW = (dL/dy)^T x, that of b the sum of dL/dy over rows. The
language-model head (`realflow.models.logprobs`) is not among these layers: it would have to keep the
gradient of its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Add = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes a parameter and a gradient to be added to what it has."""


@dataclass(frozen=True)
class Product:
    """One linear layer's part of a backward pass: `rows` [R, in] went in, `grad` [R, out] came back."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    rows: torch.Tensor
    grad: torch.Tensor


@dataclass(frozen=True)
class WeightWork:
    """The weight gradients of one micro-batch that are still to be computed."""

    products: tuple[Product, ...]

    @torch.no_grad()
    def run(self, add: Add) -> None:
        """Compute them, in the order in which backward reached the layers."""
        for product in self.products:
            add(product.weight, torch.mm(product.grad.t(), product.rows))
            if product.bias is not None:
                add(product.bias, product.grad.sum(0))


@dataclass
class Deferred:
    """Whether linear layers defer their weights' gradients (`defer`, settable), and what they queued.

    Forward passes that are made while `defer` is set are the ones whose backward defers.
    """

    defer: bool = False
    _queue: list[Product] = field(default_factory=list)

    def record(self) -> AbstractContextManager[Any]:
        """While it is entered, linear layers are made so that their backward defers, if `defer` is set."""
        return _Record(self._queue) if self.defer and torch.is_grad_enabled() else nullcontext()

    def take(self) -> WeightWork:
        """What backward has queued since the last call."""
        work = WeightWork(tuple(self._queue))
        self._queue.clear()
        return work


class _Record(TorchFunctionMode):
    """Replaces linear layers whose weight is a parameter that wants a gradient."""

    def __init__(self, queue: list[Product]) -> None:
        super().__init__()
        self._queue = queue

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and torch.is_grad_enabled() and not kwargs:
            x, weight, *rest = args
            if isinstance(weight, torch.nn.Parameter) and weight.requires_grad:
                return _Linear.apply(x, weight, rest[0] if rest else None, self._queue)
        return func(*args, **kwargs)


class _Linear(torch.autograd.Function):
    """x [..., in] -> [..., out]. Parameters get no gradient from autograd, but a place in the queue."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, queue: list[Product]
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.queue = weight, bias, queue
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        bias = ctx.bias if ctx.bias is not None and ctx.bias.requires_grad else None
        rows = x.detach().reshape(-1, x.shape[-1])
        ctx.queue.append(Product(ctx.weight, bias, rows, grad.reshape(-1, grad.shape[-1])))
        return (grad @ ctx.weight if ctx.needs_input_grad[0] else None), None, None, None
