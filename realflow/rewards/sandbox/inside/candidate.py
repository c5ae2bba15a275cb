"""Runs an untrusted program and answers calls of its functions. This is the side that may do anything.

    python -m inside.candidate PROGRAM READ WRITE        (a file, and two descriptors)

The tester asks for names, attributes and calls; nothing of the tests is in this process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from .wire import Gone, NotCarried, Wire

_SIMPLE: Mapping[str, Callable[[Any], Any]] = {
    "iter": iter, "next": next, "len": len, "str": str, "repr": repr, "bool": bool, "int": int, "float": float
}  # fmt: skip
_OPERATORS = frozenset(
    ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lt", "le", "gt", "ge", "eq", "and",
     "or", "xor", "neg", "pos", "abs", "invert", "getitem", "setitem", "delitem", "enter", "exit"]
)  # fmt: skip


class Stub:
    """A function or an object of the tests', whose work is done over there."""

    __slots__ = ("_far_number", "_side")

    def __init__(self, side: Candidate, number: int) -> None:
        object.__setattr__(self, "_side", side)
        object.__setattr__(self, "_far_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have it called over there."""
        return self._side.back("call", self, list(args), kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._side.back("look", self, [name], {})

    def __setattr__(self, name: str, value: Any) -> None:
        self._side.back("put", self, [name, value], {})


class Candidate:
    """The program's names, and the loop that answers."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO, names: dict[str, Any]) -> None:
        self._names = names
        self._stubs: dict[int, Stub] = {}
        self._wire = Wire(reader, writer, self._stub, _stub_number)

    def say(self, **message: Any) -> None:
        """Tell something that was not asked for: how the program itself ended."""
        self._wire.send(message)

    def serve(self) -> Any:
        """Answer until the other side is gone, or a call back has its answer, which is returned."""
        while True:
            message = self._wire.receive()
            if message.get("do") == "answer":
                if "error" in message:
                    raise RuntimeError(message["error"])
                return self._wire.decode(message["value"])
            self._wire.send(self._answer(message))

    def back(self, do: str, on: Stub, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Call a function of the tests', or look at an attribute of an object, or change one."""
        given = {"args": self._wire.encode(args), "kwargs": self._wire.encode(kwargs)}
        self._wire.send({"do": "back", "what": do, "on": _stub_number(on), **given})
        return self.serve()

    def _stub(self, number: int) -> Stub:
        """One and the same for a number: a program may ask whether two objects are one."""
        return self._stubs.setdefault(number, Stub(self, number))

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            if message["do"] == "names":
                return {"value": {name: _origin(value) for name, value in self._names.items()}}
            if message["do"] == "name":
                return {"value": self._wire.encode(self._names[message["name"]])}
            return self._work(message)
        except Gone:
            raise
        except BaseException as error:  # noqa: BLE001  (the program raises what it likes)
            kinds = [kind.__name__ for kind in type(error).__mro__]
            return {"error": kinds, "text": _text(error)}

    def _work(self, message: dict[str, Any]) -> dict[str, Any]:
        on = self._wire.own(message["on"])
        args = [self._wire.decode(arg) for arg in message["args"]]
        kwargs = {name: self._wire.decode(arg) for name, arg in message["kwargs"].items()}
        if message["do"] == "get":
            return {"value": self._wire.encode(getattr(on, str(args[0])))}
        if message["do"] == "isinstance":
            return {"value": isinstance(args[0], on)}
        operator = message["do"]
        if operator == "call":
            value = on(*args, **kwargs)
        elif operator in _SIMPLE:
            value = _SIMPLE[operator](on)
        elif operator in _OPERATORS:
            value = getattr(on, f"__{operator}__")(*args)
        else:
            raise AttributeError(operator)
        found = {"value": self._wire.encode(value)}
        after = [self._wire.encode(arg) for arg in args]
        if after != message["args"]:  # lists and dicts that were changed in place are changed there too
            found["args"] = after
        return found


def _stub_number(value: Any) -> int | None:
    number: int | None = object.__getattribute__(value, "_far_number") if type(value) is Stub else None
    return number


def _origin(value: Any) -> list[str]:
    """Where a name comes from, if it is the standard library: `[module]` or `[module, name]`."""
    if isinstance(value, type(sys)):
        return [value.__name__]
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if (
        isinstance(module, str)
        and isinstance(name, str)
        and module.partition(".")[0] in sys.stdlib_module_names
    ):
        return [module, name]
    return []


def _text(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception:  # noqa: BLE001  (the program's own __str__)
        return ""


def main(program: str, reader: int, writer: int) -> None:
    """Run the program, then answer."""
    with open(program, encoding="utf-8", errors="surrogatepass") as file:
        text = file.read()
    names: dict[str, Any] = {"__name__": "program", "__file__": program}
    public: dict[str, Any] = {}
    side = Candidate(os.fdopen(reader, "rb"), os.fdopen(writer, "wb"), public)
    try:
        exec(compile(text, program, "exec"), names)  # noqa: S102  (this is what the wall is for)
    except BaseException as error:  # noqa: BLE001  (the program raises what it likes)
        side.say(failed=f"{type(error).__name__}: {_text(error)}")
        return
    public.update((name, value) for name, value in names.items() if not name.startswith("__"))
    side.say(ready=True)
    try:
        side.serve()
    except (Gone, NotCarried):
        return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
