"""The two frames in which a field's values travel between workers: a msgpack header, raw bytes.

Everything that arrives is checked before it is used: sizes, types, dtypes, and that the header's
lengths add up to the bytes that came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import torch

from realflow.runtime.store import DTYPE_NAMES, DTYPES

MAX_IDS = 1 << 16
"""Samples of one request; longer requests are cut by the client."""
MAX_HEADER_BYTES = 1 << 20
MAX_FIELD_LENGTH = 256
MAX_BODY_BYTES = 1 << 32


class MalformedFrame(ValueError):
    """Bytes from a peer that are not what was agreed."""


@dataclass(frozen=True)
class Request:
    """`number` is the client's, and comes back with the reply."""

    number: int
    field: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What the body of a reply is.

    `kind` is `tensors` (packed one after the other), `values` (a msgpack list) or `error` (a text).
    A tensor field has `lengths` (first dim of each) and `trailing` (its further dims).
    """

    number: int
    kind: str
    dtype: str = ""
    lengths: tuple[int, ...] = ()
    trailing: tuple[int, ...] = ()


def encode_request(request: Request) -> bytes:
    """One frame."""
    return msgpack.packb([request.number, request.field, request.ids])


def decode_request(frame: bytes) -> Request:
    """Read `encode_request`. Raises MalformedFrame for anything else."""
    match _unpacked(frame):
        case [int(number), str(field), list(ids)] if (
            number >= 0
            and len(field) <= MAX_FIELD_LENGTH
            and 0 < len(ids) <= MAX_IDS
            and all(type(sample) is int and sample >= 0 for sample in ids)
        ):
            return Request(number, field, tuple(ids))
    raise MalformedFrame("not a request")


def encode_reply(number: int, values: Sequence[Any]) -> tuple[bytes, memoryview | bytes]:
    """Header and body for the values of one field.

    Raises ValueError where the values cannot go into one reply: tensors of several dtypes or trailing
    dims, or tensors beside other values.
    """
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not tensors:
        body = msgpack.packb(list(values), unicode_errors="surrogatepass")
        return _header(Header(number, "values")), body
    kinds = {(value.dtype, tuple(value.shape[1:])) for value in tensors}
    if len(tensors) != len(values) or len(kinds) != 1:
        raise ValueError("its values differ in dtype, trailing dims, or in being tensors at all")
    ((dtype, trailing),) = kinds
    lengths = tuple(value.shape[0] for value in tensors)
    # One copy into one buffer: a frame for each sample would cost far more than the copy.
    flat = torch.cat(tensors).reshape(-1)
    body = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return _header(Header(number, "tensors", DTYPE_NAMES[dtype], lengths, trailing)), body


def encode_error(number: int, text: str) -> tuple[bytes, bytes]:
    """A reply that says why there are no values."""
    return _header(Header(number, "error")), text.encode(errors="replace")


def decode_header(frame: bytes) -> Header:
    """Read a reply's first frame. Raises MalformedFrame."""
    match _unpacked(frame):
        case [int(number), "tensors", str(dtype), list(lengths), list(trailing)] if (
            dtype in DTYPES and _are_sizes(lengths, MAX_IDS) and _are_sizes(trailing, 8)
        ):
            return Header(number, "tensors", dtype, tuple(lengths), tuple(trailing))
        case [int(number), "values" | "error" as kind, "", [], []]:
            return Header(number, kind)
    raise MalformedFrame("not a reply")


def decode_values(header: Header, body: memoryview, count: int) -> list[Any]:
    """The `count` values of a reply. The tensors are views of one fresh, writable buffer.

    Raises MalformedFrame where header, body and count do not agree.
    """
    if header.kind == "values":
        values = _unpacked(body, MAX_BODY_BYTES)
        if not isinstance(values, list) or len(values) != count:
            raise MalformedFrame(f"expected a list of {count} values")
        return values
    dtype = DTYPES[header.dtype]
    row = math.prod(header.trailing)
    elements = sum(header.lengths) * row
    if len(header.lengths) != count or elements * dtype.itemsize != body.nbytes:
        raise MalformedFrame(
            f"{body.nbytes} bytes do not hold {elements} elements of {header.dtype} of {count} samples"
        )
    flat = torch.frombuffer(bytearray(body), dtype=dtype) if elements else torch.empty(0, dtype=dtype)
    return list(flat.view(sum(header.lengths), *header.trailing).split(list(header.lengths)))


def _header(header: Header) -> bytes:
    return msgpack.packb([header.number, header.kind, header.dtype, header.lengths, header.trailing])


def _are_sizes(values: list[Any], most: int) -> bool:
    return len(values) <= most and all(type(v) is int and 0 <= v <= MAX_BODY_BYTES for v in values)


def _unpacked(frame: bytes | memoryview, most: int = MAX_HEADER_BYTES) -> Any:
    if len(frame) > most:
        raise MalformedFrame(f"{len(frame)} bytes, more than {most}")
    try:
        return msgpack.unpackb(frame, unicode_errors="surrogatepass")
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise MalformedFrame(str(error)) from None
