"""The compiled operators of `csrc/`: the library `realflow._C`, loaded at the first use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from realflow.errors import RunError


@cache
def operators() -> torch._ops._OpNamespace:
    """`torch.ops.realflow`. Raises RunError where the library has not been built."""
    spec = importlib.util.find_spec("realflow._C")
    if spec is None or spec.origin is None:
        raise RunError(
            "the compiled kernels (realflow._C) are not built; run `make setup`, or `pip install -e .` "
            "with a C++ compiler at hand"
        )
    torch.ops.load_library(spec.origin)
    return torch.ops.realflow


def operator(name: str, device: torch.device) -> Callable[..., Any] | None:
    """The operator `name` where it is built for tensors on `device`, else None: for what torch can do
    as well, if slower."""
    try:
        found = getattr(operators(), name)
    except (RunError, AttributeError):  # no library, or one that is older than the operator
        return None
    key = getattr(torch._C.DispatchKey, device.type.upper(), None)
    built = key is not None and found.default.has_kernel_for_dispatch_key(key)
    return found if built else None
