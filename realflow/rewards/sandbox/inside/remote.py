"""What a test holds of the candidate: stand-ins whose work is done on the other side.

A test compares plain values here, where the program cannot reach. Therefore a stand-in is never equal to a
plain value, and an operator never sends one over: a program that returns an object which claims to equal,
or to be near, whatever it is compared with gains nothing by it.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

from .wire import Gone, Wire

TESTS = "tests"
"""The module that classes of tests have: a program may look into objects of these that it was given."""

_MOST = 1_000_000


class CandidateError(Exception):
    """The program raised something that has no name here; the text says its name."""


class Far:
    """The other side."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self.wire = Wire(reader, writer, lambda number: Remote(self, number), _number)

    def ask(
        self, do: str, on: int | None = None, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Have something done over there. Raises what the program raised, or Gone."""
        sent = [self._sent(arg) for arg in args]
        named = {name: self._sent(arg) for name, arg in (kwargs or {}).items()}
        self.wire.send({"do": do, "on": on, "args": sent, "kwargs": named})
        message = self._answer()
        for arg, after in zip(args, message.get("args", ()), strict=False):
            _change(arg, self.wire.decode(after))
        return self.wire.decode(message.get("value"))

    def _sent(self, arg: Any) -> Any:
        """An argument; an iterator goes with all that it has."""
        if isinstance(arg, Iterator) and not isinstance(arg, Remote):
            return {"n": [self.wire.encode(item) for item in islice(arg, _MOST)]}
        return self.wire.encode(arg)

    def names(self) -> dict[str, list[str]]:
        """The program's names, and where each comes from if it is the standard library."""
        self.wire.send({"do": "names"})
        found = self._answer().get("value")
        if not isinstance(found, dict):
            raise Gone("what it sent are no names")
        return found

    def name(self, name: str) -> Any:
        """The value of a name: plain, or a stand-in."""
        self.wire.send({"do": "name", "name": name})
        return self.wire.decode(self._answer().get("value"))

    def _answer(self) -> dict[str, Any]:
        while True:
            message = self.wire.receive()
            if message.get("do") == "back":
                self._call_back(message)
                continue
            if "error" in message:
                raise _error(message["error"], str(message.get("text", "")))
            return message

    def _call_back(self, message: dict[str, Any]) -> None:
        """The program calls a function that a test gave it, or uses an object that a test gave it; it can
        reach nothing else that a test holds."""
        on = self.wire.own(message.get("on"))
        args, kwargs = self.wire.decode(message.get("args")), self.wire.decode(message.get("kwargs"))
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise Gone("what it sent is no call")
        try:
            value = self.wire.encode(_used(str(message.get("what")), on, args, kwargs))
        except Gone:
            raise
        except Exception as error:  # noqa: BLE001  (a function of the tests; the program may expect it)
            self.wire.send({"do": "answer", "error": f"{type(error).__name__}: {error}"[:1000]})
        else:
            self.wire.send({"do": "answer", "value": value})


class Remote:
    """Stands for an object of the program. Operators work with others of its kind alone."""

    __slots__ = ("_far", "_far_number")

    def __init__(self, far: Far, number: int) -> None:
        object.__setattr__(self, "_far", far)
        object.__setattr__(self, "_far_number", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._far.ask("get", self._far_number, [name])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have it called over there."""
        return self._far.ask("call", self._far_number, args, kwargs)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Remote):
            return NotImplemented  # then it is the other's to say, which for plain values is no
        return self._far.ask("eq", self._far_number, [other]) is True

    def __hash__(self) -> int:
        return hash(self._far_number)

    def __iter__(self) -> Any:
        found = self._far.ask("iter", self._far_number)
        return found if isinstance(found, Remote) else iter(found)

    def __next__(self) -> Any:
        return self._far.ask("next", self._far_number)

    def __instancecheck__(self, instance: object) -> bool:
        return (
            isinstance(instance, Remote) and self._far.ask("isinstance", self._far_number, [instance]) is True
        )

    def __enter__(self) -> Any:
        return self._far.ask("enter", self._far_number)

    def __exit__(self, *_: object) -> None:
        self._far.ask("exit", self._far_number, [None, None, None])


def _typed(operator: str, kind: type) -> Any:
    def convert(self: Remote) -> Any:
        found = self._far.ask(operator, self._far_number)
        if type(found) is not kind:
            raise TypeError(f"__{operator}__ of the program's object returned {type(found).__name__}")
        return found

    return convert


def _operator(operator: str) -> Any:
    def work(self: Remote, *others: Any) -> Any:
        if not all(isinstance(other, Remote) for other in others):
            return NotImplemented
        return self._far.ask(operator, self._far_number, others)

    return work


def _item(operator: str) -> Any:
    return lambda self, *args: self._far.ask(operator, self._far_number, args)


for _name, _kind in {"len": int, "bool": bool, "str": str, "repr": str, "int": int, "float": float}.items():
    setattr(Remote, f"__{_name}__", _typed(_name, _kind))
for _name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lt", "le", "gt", "ge", "and", "or",
    "xor", "neg", "pos", "abs", "invert",
):  # fmt: skip
    setattr(Remote, f"__{_name}__", _operator(_name))
for _name in ("getitem", "setitem", "delitem"):
    setattr(Remote, f"__{_name}__", _item(_name))


def _used(what: str, on: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if what == "call" and callable(on):
        return on(*args, **kwargs)
    name = args[0] if args else None
    if type(on).__module__ != TESTS or not isinstance(name, str) or name.startswith("_"):
        raise AttributeError(f"{type(on).__name__} of the tests has no {name} for a program")
    if what == "look":
        return getattr(on, name)
    setattr(on, name, args[1])
    return None


def _number(value: Any) -> int | None:
    number: int | None = object.__getattribute__(value, "_far_number") if type(value) is Remote else None
    return number


def _error(kinds: Any, text: str) -> Exception:
    """The error that the program raised, as the nearest one of Python's own."""
    names = [kind for kind in kinds if isinstance(kind, str)] if isinstance(kinds, list) else []
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            try:
                return kind(text)
            except TypeError:  # such as UnicodeDecodeError, which takes more
                break
    return CandidateError(f"{names[0] if names else 'an error'}: {text}")


def _change(arg: Any, after: Any) -> None:
    """Give a list, dict or set what the program left in it."""
    if type(arg) is not type(after):
        return
    if isinstance(arg, list | bytearray):
        arg[:] = after
    elif isinstance(arg, dict | set):
        arg.clear()
        cast(Any, arg).update(after)
