"""The fields that a worker keeps: one value for each sample, until the field's last reader is done."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from realflow.engines.values import JSON_DEPTH, is_json
from realflow.errors import RunError

DTYPES: Mapping[str, torch.dtype] = {
    "int64": torch.int64,
    "int32": torch.int32,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "bool": torch.bool,
    "uint8": torch.uint8,
}
"""The dtypes of token fields, by the name that they have between workers."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class FieldStore:
    """Values by field and sample id, safe to use from several threads.

    A value is a tensor (its first dim counts tokens) of a dtype in `DTYPES`, or a JSON value. Tensors
    are kept on the CPU, detached, in storage of their own size; nobody may write to one that is here,
    neither who put it nor who got it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fields: dict[str, dict[int, Any]] = {}
        self._bytes = 0

    def put(self, field: str, values: Mapping[int, Any]) -> None:
        """Keep `values` (sample id -> value), in place of what was there for these ids.

        Raises RunError, and keeps nothing, where a value is neither a tensor of a known dtype nor
        JSON.
        """
        kept = {sample: _kept(field, sample, value) for sample, value in values.items()}
        sizes = {sample: _size(value) for sample, value in kept.items()}
        with self._lock:
            column = self._fields.setdefault(field, {})
            self._bytes += sum(sizes.values())
            self._bytes -= sum(_size(column[sample]) for sample in kept if sample in column)
            column.update(kept)

    def get(self, field: str, ids: Sequence[int]) -> list[Any]:
        """The value of each id, in order. Raises RunError naming the field and the ids not held."""
        with self._lock:
            column = self._fields.get(field, {})
            found = [column.get(sample, _ABSENT) for sample in ids]
        absent = [sample for sample, value in zip(ids, found, strict=True) if value is _ABSENT]
        if absent:
            shown = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
            raise RunError(f"field {field!r} is not here for {len(absent)} of {len(ids)} samples: {shown}")
        return found

    def missing(self, field: str, ids: Iterable[int]) -> list[int]:
        """The ids that have no value, in order."""
        with self._lock:
            column = self._fields.get(field, {})
            return [sample for sample in ids if sample not in column]

    def free(self, field: str, ids: Iterable[int]) -> None:
        """Forget the values of these ids; ids without one are passed over, so that it can be repeated."""
        with self._lock:
            column = self._fields.get(field)
            if column is None:
                return
            for sample in ids:
                self._bytes -= _size(column.pop(sample, None))
            if not column:
                del self._fields[field]

    def held(self) -> dict[str, int]:
        """Field -> how many samples have a value."""
        with self._lock:
            return {field: len(column) for field, column in self._fields.items()}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors and texts, and eight for each other scalar."""
        with self._lock:
            return self._bytes


_ABSENT = object()


def _kept(field: str, sample: int, value: Any) -> Any:
    """The value as it is stored."""
    if not isinstance(value, torch.Tensor):
        if not is_json(value):
            raise RunError(
                f"field {field!r} of sample {sample}: {type(value).__name__} is neither a tensor nor a JSON "
                "value (null, bool, 64-bit int, float, text, list, or dict with text keys, at most "
                f"{JSON_DEPTH} deep)"
            )
        return value
    if value.dtype not in DTYPE_NAMES or value.dim() == 0:
        raise RunError(
            f"field {field!r} of sample {sample}: a tensor of {value.dtype} with {value.dim()} dims; "
            f"expected at least one dim and one of {', '.join(DTYPES)}"
        )
    value = value.detach().cpu().contiguous()
    # A slice of a packed batch would keep the whole batch alive.
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def _size(value: Any) -> int:
    """Bytes that a value counts for."""
    match value:
        case None:
            return 0
        case torch.Tensor():
            return value.nbytes
        case str():
            return len(value)
        case list():
            return sum(map(_size, value))
        case dict():
            return sum(len(key) + _size(item) for key, item in value.items())
    return 8
