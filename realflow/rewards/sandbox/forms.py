"""The forms in which data sets write tests of a program, read into one of three."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Asserts:
    """Python code: each of `units` holds where it raises nothing. `setup` runs once before them; `entry` is
    a name that is the program's, whatever the setup makes of it."""

    units: tuple[str, ...]
    setup: str = ""
    entry: str | None = None


@dataclass(frozen=True)
class Calls:
    """A function (or a method of the class Solution), called with arguments; and what it should return."""

    function: str
    cases: tuple[tuple[list[Any], Any], ...]


@dataclass(frozen=True)
class Dialogues:
    """Pairs of what the program reads and what it should print."""

    pairs: tuple[tuple[str, str], ...]


Tests = Asserts | Calls | Dialogues

_FORMS = (
    "Python code with asserts, a list of such, {'inputs': [...], 'outputs': [...]} of texts (with 'fn_name' "
    "of arguments and results), or a list of {'input': .., 'output': ..}; or one of these as JSON text"
)


def read_tests(value: Any) -> Tests:
    """Tests as a data set has them (see `rewards.code`). Raises ValueError that says what was expected."""
    if isinstance(value, Asserts | Calls | Dialogues):
        found: Tests = value
    elif isinstance(value, str):
        found = _from_text(value)
    elif isinstance(value, Mapping):
        found = _from_columns(value)
    elif isinstance(value, Sequence) and value and all(isinstance(item, str) for item in value):
        found = Asserts(tuple(value))
    elif isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
        found = _from_rows(value)
    else:
        raise _unknown(value)
    return found


def _from_text(text: str) -> Tests:
    if text.lstrip()[:1] in ("{", "["):
        try:
            return read_tests(json.loads(text))
        except json.JSONDecodeError:
            pass  # Python may begin like this
    if not text.strip():
        raise _unknown(text)
    return Asserts((text,))


def _from_columns(value: Mapping[str, Any]) -> Tests:
    inputs, outputs = value.get("inputs"), value.get("outputs")
    if (
        not isinstance(inputs, list)
        or not isinstance(outputs, list)
        or len(inputs) != len(outputs)
        or not inputs
    ):
        raise _unknown(value)
    function = value.get("fn_name")
    if function is None:
        return Dialogues(tuple((_lines(a), _lines(b)) for a, b in zip(inputs, outputs, strict=True)))
    if not isinstance(function, str) or not function.isidentifier():
        raise ValueError(f"the tests' fn_name is {function!r}; expected a function's name")
    for args in inputs:
        if not isinstance(args, list):
            raise ValueError(f"the tests of {function} hold {args!r:.80}; expected a list of arguments")
    return Calls(function, tuple(zip(inputs, outputs, strict=True)))


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> Tests:
    """LiveCodeBench's: texts, or with `testtype: functional` arguments as lines of JSON."""
    for row in rows:
        if not isinstance(row.get("input"), str) or not isinstance(row.get("output"), str):
            raise _unknown(row)
    functions = {row.get("fn_name") for row in rows}
    if functions == {None}:
        return Dialogues(tuple((row["input"], row["output"]) for row in rows))
    if len(functions) != 1:
        raise ValueError(f"the tests name several functions: {', '.join(map(str, functions))}")
    try:
        inputs = [[json.loads(line) for line in row["input"].splitlines() if line.strip()] for row in rows]
        outputs = [json.loads(row["output"]) for row in rows]
    except json.JSONDecodeError as error:
        raise ValueError(f"the tests' arguments and results are no JSON: {error}") from error
    return _from_columns({"fn_name": functions.pop(), "inputs": inputs, "outputs": outputs})


def _lines(value: Any) -> str:
    """A text, or a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"the tests hold {value!r:.80}; expected what the program reads and prints, as text")
    return value


def _unknown(value: Any) -> ValueError:
    return ValueError(f"the tests are {value!r:.80} ({type(value).__name__}); expected {_FORMS}")
