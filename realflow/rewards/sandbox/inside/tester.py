"""Runs tests on a candidate that lives behind another wall, and says of each whether it holds.

    python -m inside.tester TESTS READ WRITE VERDICT        (a JSON file, and three descriptors)

TESTS is `{"setup": text, "units": [text, ..], "entry": name or null}` (the name that is the program's,
whatever the setup makes of it), or `{"function": name, "cases": [[args, expected], ..],
"tolerance": t}`. To VERDICT goes a line of JSON for each: `{"passed": bool, "note": text}`; or one
`{"broken": text}`, where the tests themselves cannot be read.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .compare import same_value
from .remote import TESTS, Far, Remote
from .wire import Gone, NotCarried

_LONGEST_NOTE = 300
_TRUSTED = frozenset(
    ["bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq",
     "itertools", "json", "math", "numpy", "operator", "random", "re", "statistics", "string", "time",
     "typing"]
)  # fmt: skip
"""Modules that a test may have by the program's imports. They are the real ones, and nothing in them gives
objects that equal whatever they are compared with (as `unittest.mock.ANY` does)."""


def main(file: str, reader: int, writer: int, verdict: int) -> None:
    """Test, and report as it goes."""
    with open(file, encoding="utf-8") as opened:
        tests = json.load(opened)
    out = os.fdopen(verdict, "w", encoding="utf-8")

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        codes = [_compiled(text) for text in (tests.get("setup", ""), *tests.get("units", ()))]
    except (SyntaxError, ValueError) as error:
        say(broken=f"{type(error).__name__}: {error}")
        return
    far = Far(os.fdopen(reader, "rb"), os.fdopen(writer, "wb"))
    for unit in _units(far, tests, codes):
        passed, note = _outcome(unit)
        say(passed=passed, note=note[:_LONGEST_NOTE])


def _compiled(text: str) -> Any:
    return compile(ast.parse(text), "tests", "exec")


def _units(far: Far, tests: dict[str, Any], codes: list[Any]) -> Iterator[Callable[[], None]]:
    """What is to be run, one after the other; each raises where it does not hold."""
    if "function" in tests:
        for args, expected in tests["cases"]:
            yield partial(_case, far, tests, args, expected)
        return
    names: dict[str, Any] = {"__name__": TESTS}
    loaded: list[bool] = []
    setup, *units = codes
    for code in units:

        def run(code: Any = code) -> None:
            if not loaded:
                _started(far)
                loaded.append(True)
                names.update(_names(far, {word for each in codes for word in _words(each)}))
                exec(setup, names)  # noqa: S102  (the tests are what is to be run)
                if tests.get("entry"):
                    names[tests["entry"]] = far.name(tests["entry"])
            _run(code, names)

        yield run


def _started(far: Far) -> None:
    """Wait for the program to have run. Raises Gone where it failed."""
    found = far.wire.receive()
    if found.get("ready") is not True:
        raise Gone(str(found.get("failed", "it has ended")))


def _words(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _words(constant)


def _names(far: Far, used: set[str]) -> dict[str, Any]:
    """The program's names that tests use. What the standard library has is taken from here, and a name of
    Python's own (`abs`, `all`) is never the program's: a test may lean on it."""
    found = {}
    for name, origin in far.names().items():
        if name not in used or hasattr(builtins, name):
            continue
        found[name] = _standard(origin) if origin else None
        if found[name] is None:
            found[name] = far.name(name)
    return found


def _standard(origin: list[str]) -> Any:
    module = origin[0]
    if module.partition(".")[0] not in _TRUSTED:
        return None
    try:
        found = importlib.import_module(module)
        for part in origin[1].split(".") if len(origin) > 1 else ():
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def _run(code: Any, names: dict[str, Any]) -> None:
    """Run a text of tests: its asserts, then the functions `test_...` and unittest cases it has defined."""
    before = set(names)
    exec(code, names)  # noqa: S102  (the tests are what is to be run)
    for name in [name for name in names if name not in before]:
        made = names[name]
        unittest = sys.modules.get("unittest")  # there where the tests have imported it
        if unittest is not None and isinstance(made, type) and issubclass(made, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(made).run(result)
            for _, trace in [*result.errors, *result.failures]:
                raise AssertionError(trace.strip().splitlines()[-1])
        elif name.startswith("test_") and callable(made) and not isinstance(made, Remote):
            made()


def _case(far: Far, tests: dict[str, Any], args: list[Any], expected: Any) -> None:
    """One call of a function, and what it returns compared here."""
    if "called" not in tests:
        _started(far)
        tests["called"] = _function(far, tests["function"])
    found = tests["called"](*args)
    if isinstance(found, Remote):
        found = list(found)
    alone = isinstance(expected, list) and len(expected) == 1  # APPS writes some results as lists of one
    near = tests["tolerance"]
    if not same_value(found, expected, near) and not (alone and same_value(found, expected[0], near)):
        raise AssertionError(f"returned {found!r:.100}, not {expected!r:.100}")


def _function(far: Far, name: str) -> Any:
    """The program's function, or the method of its class Solution."""
    names = far.names()
    if name in names:
        return far.name(name)
    if "Solution" in names:
        return getattr(far.name("Solution")(), name)
    raise NameError(f"the program has no {name}")


def _outcome(unit: Callable[[], None]) -> tuple[bool, str]:
    try:
        unit()
    except Gone as error:
        return False, f"the program ended: {error}"
    except NotCarried as error:
        return False, str(error)
    except BaseException as error:  # noqa: BLE001  (tests raise what they like)
        return False, f"{type(error).__name__}: {error}"
    return True, ""


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
