"""Float64 models compute in float64 throughout.

The norms of `transformers` cast to float32 whatever the model's dtype. In bfloat16 that is what one
wants; in float64, which is for proofs, it makes the last digits depend on the order of sums (Gemma's
norms even sum the gradients of their weights in float32), so that layouts agree only to 1e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def full_precision(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """While it is entered, modules of a model of `dtype` keep float64 where they would cast to float32.

    Nothing changes for other dtypes. A plain Hugging Face model in float64 is exact under it too.
    """
    return _StayWide() if dtype == torch.float64 else nullcontext()


class _StayWide(TorchFunctionMode):
    """Casts of float64 tensors to float32 return the tensor itself."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.float, torch.Tensor.to) and args[0].dtype == torch.float64:
            narrow = func is torch.Tensor.float or torch.float32 in (*args[1:], kwargs.get("dtype"))
            if narrow:
                return args[0]
        return func(*args, **kwargs)
