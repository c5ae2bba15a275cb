"""Values and calls between a tester and a candidate that must not see each other's memory.

Each message is a line of JSON. Plain values travel by value and arrive as exactly these types; whatever
else a program makes (an object, a generator, a class) stays where it is and travels as a number for it.
Nothing that arrives is executed, and no class of the other side is ever built here.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

LONGEST = 32 << 20
"""Bytes of a message."""

_DEPTH = 100
_SMALL = 1 << 53


class Gone(Exception):
    """The other side has ended, or speaks another language."""


class NotCarried(Exception):
    """A value cannot travel: it is nested too deep, or within itself."""


class Wire:
    """One end: sends messages, and knows the own values that the other side has numbers for.

    `stand_in(number)` makes what a number of the other side becomes here, `number_of(value)` says whether
    a value is such a one.
    """

    def __init__(
        self,
        reader: BinaryIO,
        writer: BinaryIO,
        stand_in: Callable[[int], Any],
        number_of: Callable[[Any], int | None],
    ) -> None:
        self._reader, self._writer = reader, writer
        self._stand_in, self._number_of = stand_in, number_of
        self._own: dict[int, Any] = {}

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message whose values are encoded. Raises Gone."""
        try:
            self._writer.write(json.dumps(message).encode() + b"\n")
            self._writer.flush()
        except (OSError, ValueError) as error:
            raise Gone("it has ended") from error

    def receive(self) -> dict[str, Any]:
        """The next message. Raises Gone."""
        try:
            line = self._reader.readline(LONGEST)
        except (OSError, ValueError) as error:
            raise Gone("it has ended") from error
        if not line.endswith(b"\n"):
            raise Gone("it has ended" if len(line) < LONGEST else "its message is too long")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Gone("what it sent is no message") from error
        if not isinstance(message, dict):
            raise Gone("what it sent is no message")
        return message

    def own(self, number: Any) -> Any:
        """The value that the other side has a number for. Raises Gone for a number that was never given."""
        if not isinstance(number, int) or number not in self._own:
            raise Gone("it asked for what it was not given")
        return self._own[number]

    def encode(self, value: Any, depth: int = _DEPTH) -> Any:
        """A value as JSON. Raises NotCarried."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            whole = int.__int__(value)
            return whole if abs(whole) < _SMALL else {"i": hex(whole)}
        if isinstance(value, float):
            real = float.__float__(value)
            return real if real - real == 0 else {"f": repr(real)}
        if depth == 0:
            raise NotCarried("a value is nested too deep, or holds itself")
        if (number := self._number_of(value)) is not None:
            return {"y": number}
        return self._encode_more(value, depth - 1)

    def _encode_more(self, value: Any, depth: int) -> Any:
        if isinstance(value, list | tuple | set | frozenset):
            items = [self.encode(item, depth) for item in value]
            if isinstance(value, list):
                return items
            return {"t" if isinstance(value, tuple) else "s" if isinstance(value, set) else "z": items}
        if isinstance(value, dict):
            return {"d": [[self.encode(k, depth), self.encode(v, depth)] for k, v in value.items()]}
        if isinstance(value, bytes | bytearray):
            return {"b" if isinstance(value, bytes) else "a": value.hex()}
        if isinstance(value, range):
            return {"r": [value.start, value.stop, value.step]}
        if isinstance(value, complex):
            return {"c": [self.encode(value.real), self.encode(value.imag)]}
        if type(value).__name__ in _EXACT and type(value).__module__ == _EXACT[type(value).__name__]:
            return {type(value).__name__: str(value)}
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return self.encode(value.tolist(), depth)
        number = id(value)
        self._own[number] = value  # which also keeps it alive, and its id its own
        return {"o": number}

    def decode(self, found: Any) -> Any:
        """The value that `encode` made this of. Raises Gone for anything else."""
        try:
            return self._decode(found)
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            raise Gone("what it sent is no value") from error

    def _decode(self, found: Any) -> Any:
        if isinstance(found, list):
            return [self._decode(item) for item in found]
        if not isinstance(found, dict):
            return found
        ((kind, inner),) = found.items()
        if kind == "y":
            return self.own(inner)
        if kind == "o":
            if type(inner) is not int:
                raise Gone("what it sent is no number")
            return self._stand_in(inner)
        if kind == "d":
            return {self._decode(key): self._decode(value) for key, value in inner}
        if kind in _EXACT:
            return getattr(importlib.import_module(_EXACT[kind]), kind)(str(inner))
        return _PLAIN[kind](self._decode(inner))


_EXACT: Mapping[str, str] = {"Decimal": "decimal", "Fraction": "fractions"}
_PLAIN: Mapping[str, Callable[[Any], Any]] = {
    "i": lambda text: int(text, 16),
    "f": float,
    "t": tuple,
    "s": set,
    "z": frozenset,
    "b": bytes.fromhex,
    "a": bytearray.fromhex,
    "n": iter,
    "r": lambda bounds: range(*bounds),
    "c": lambda parts: complex(*parts),
}
