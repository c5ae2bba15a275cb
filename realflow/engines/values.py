"""Values that cross the border to a user's function: what is accepted, and in which form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from realflow.data.batch import unpack
from realflow.graph.schema import shown
from realflow.graph.types import Dtype, FieldUse

JSON_DEPTH = 32
"""How deep lists and dicts may be nested."""

EXPECTED: Mapping[Dtype, str] = {
    "int": "a whole number of 64 bits",
    "float": "a finite number",
    "bool": "true or false",
    "text": "text",
    "any": "a JSON value (null, bool, 64-bit int, float, text, list, or dict with text keys, at most "
    f"{JSON_DEPTH} deep)",
}


class BadValue(Exception):
    """A value is wrong. `index` is the place of its sample, None where all samples are concerned."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


def plain(value: Any, dtype: Dtype) -> Any:
    """`value` as a plain Python value of `dtype`: scalars of numpy and torch are unwrapped, an int or
    bool is taken as a float. NaN and infinity are let through. Raises BadValue for anything else.
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if dtype == "float" and isinstance(value, Real):
        return float(value)
    if dtype == "int" and isinstance(value, Integral) and not isinstance(value, bool) and _fits(int(value)):
        return int(value)
    if dtype == "bool" and isinstance(value, bool):
        return value
    if (dtype == "text" and isinstance(value, str)) or (dtype == "any" and is_json(value)):
        return value
    raise BadValue(f"{shown(value)} ({type(value).__name__}); expected {EXPECTED[dtype]}")


def returned(use: FieldUse, value: Any, lengths: Sequence[int], *, optional: bool = False) -> list[Any]:
    """A field that a function returned, as a value for each of the samples of `lengths` tokens.

    `optional` lets None through. Raises BadValue for a wrong number of values, a wrong type, NaN or
    infinity.
    """
    if use.extent == "token":
        return _token_field(use, value, lengths)
    if isinstance(value, torch.Tensor):
        value = value.detach()
    if hasattr(value, "tolist"):  # a tensor or a numpy array
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise BadValue(f"returned {kind(value)} for {use.name}; expected a list with an entry a sample")
    if len(value) != len(lengths):
        raise BadValue(
            f"returned {len(value)} values for {use.name}; expected {len(lengths)}, one for each sample"
        )
    return [_sample_value(use, entry, optional, index) for index, entry in enumerate(value)]


def kind(value: Any) -> str:
    """What a value is, in a few words: `a float32 tensor of shape (3, 2)`."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return shown(value) if value is None else f"{type(value).__name__} {shown(value)}"


def _sample_value(use: FieldUse, value: Any, optional: bool, index: int) -> Any:
    if value is None and optional:
        return None
    try:
        found = plain(value, use.dtype)
    except BadValue as error:
        raise BadValue(f"returned for {use.name} {error}", index) from None
    if isinstance(found, float) and not math.isfinite(found):
        raise BadValue(f"returned {found} for {use.name}; expected {EXPECTED['float']}", index)
    return found


def _token_field(use: FieldUse, value: Any, lengths: Sequence[int]) -> list[torch.Tensor]:
    total = sum(lengths)
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != total:
        raise BadValue(
            f"returned {kind(value)} for {use.name}; expected a tensor whose first dim is the {total} tokens"
        )
    value = value.detach()
    if use.dtype == "float" and not value.is_floating_point():
        value = value.float()
    fits = {
        "float": value.is_floating_point(),
        "int": value.dtype == torch.int64,
        "bool": value.dtype == torch.bool,
    }
    if not fits.get(use.dtype, False):
        raise BadValue(f"returned {kind(value)} for {use.name}; expected entries of type {use.dtype}")
    parts: list[torch.Tensor] = unpack(value, lengths, "token")
    if use.dtype == "float" and not value.isfinite().all():
        index = next(i for i, part in enumerate(parts) if not part.isfinite().all())
        token = int((~parts[index].isfinite()).nonzero()[0, 0])
        raise BadValue(f"returned {parts[index][token].tolist()} for {use.name} at token {token}", index)
    return parts


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def is_json(value: Any, depth: int = JSON_DEPTH) -> bool:
    """Whether a value survives the way to another worker (as msgpack) unchanged."""
    match value:
        case None | bool() | float() | str():
            return True
        case int():
            return -(2**63) <= value < 2**64
        case list():
            return depth > 0 and all(is_json(item, depth - 1) for item in value)
        case dict():
            return depth > 0 and all(
                isinstance(key, str) and is_json(item, depth - 1) for key, item in value.items()
            )
    return False
