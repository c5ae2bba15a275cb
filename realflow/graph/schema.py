"""Reading plain values strictly: kinds, sections, and a report that collects every problem.

A `Kind` says what is expected and turns a plain value into a typed one. A `Section` is one mapping
of a file: each key is taken once, and what nobody took is reported with the nearest spelling.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from realflow.errors import InputError, Problem
from realflow.graph.types import Amount, Place
from realflow.graph.yamlfile import BROKEN, Document, Key, KeyPath

T = TypeVar("T")
D = TypeVar("D")

LARGEST = 2**31 - 1
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Wrong(Exception):
    """A value is not of the kind; the text is added to the message ("did you mean ...")."""


@dataclass(frozen=True)
class Kind(Generic[T]):
    """`read` returns the typed value, or raises `Wrong`; `expected` completes "expected ..."."""

    expected: str
    read: Callable[[Any], T]


def nearest(name: object, known: Iterable[str], *, many: int = 12) -> str:
    """`did you mean 'x'?` where a known name is near, and otherwise the list of what is known."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if not names:
        return "there is none"
    return f"known: {', '.join(names[:many])}{', ...' if len(names) > many else ''}"


def shown(value: Any) -> str:
    """A found value in words, kept short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{str(value).lower()}"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = f"the text {value!r}" if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:76]}..."


def whole(least: int = 0, most: int = LARGEST) -> Kind[int]:
    """A whole number; `true` is none."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise Wrong
        return value

    return Kind(
        f"a whole number from {least} to {most}" if most != LARGEST else f"a whole number >= {least}", read
    )


def number(
    expected: str = "a number", *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf,
    below: float = math.inf,
) -> Kind[float]:  # fmt: skip
    """A finite number in `[least, most]`, greater than `above` and less than `below`."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Wrong
        try:
            result = float(value)
        except OverflowError as error:
            raise Wrong from error
        if not math.isfinite(result) or not (least <= result <= most and above < result < below):
            raise Wrong
        return result

    return Kind(expected, read)


def _read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Wrong
    return value


def _read_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise Wrong
    return value


FLAG = Kind("true or false", _read_flag)
TEXT = Kind("text", _read_text)


def named(expected: str = "a name of letters, digits and _", pattern: re.Pattern[str] = NAME) -> Kind[str]:
    """Text that matches a pattern from end to end."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise Wrong
        return value

    return Kind(expected, read)


def one_of(*choices: str) -> Kind[Any]:
    """One of a few words."""

    def read(value: Any) -> str:
        if value not in choices or not isinstance(value, str):
            near = difflib.get_close_matches(str(value), choices, n=1) if isinstance(value, str) else []
            raise Wrong(f"did you mean {near[0]!r}?" if near else "")
        return value

    return Kind(f"one of {', '.join(choices)}", read)


def _read_plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise Wrong(f"{value} is no finite number")
    if isinstance(value, Mapping):
        return {_read_key(key): _read_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_read_plain(item) for item in value]
    if value is not None and value is not BROKEN and not isinstance(value, str | bool | int | float):
        raise Wrong(f"{type(value).__name__} is not plain")
    return value


def _read_key(key: Any) -> Key:
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise Wrong(f"the key {key!r} is not plain")
    return key


def _of_type(*types: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, types):
            raise Wrong
        return _read_plain(value)

    return read


PLAIN = Kind("plain values: finite numbers, text, true, false, null, lists and mappings of them", _read_plain)
ANY_TEXT = Kind("text", _of_type(str))
PLAIN_LIST = Kind("a list of plain values", _of_type(list, tuple))
PLAIN_MAPPING = Kind("a mapping of plain values", _of_type(Mapping))

_AMOUNT = re.compile(r"([0-9]{1,18})\s+([a-z]+)")


def amount(*units: str) -> Kind[Amount]:
    """A count of at least 1 with its unit, such as `8 prompts` (or `1 prompt`)."""
    example = " or ".join(f"'8 {unit}'" for unit in units)

    def read(value: Any) -> Amount:
        if isinstance(value, int) and not isinstance(value, bool):
            raise Wrong("the unit is missing")
        match = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise Wrong
        count, word = int(match.group(1)), match.group(2)
        unit = word if word.endswith("s") else f"{word}s"
        if unit not in units:
            raise Wrong(f"the unit {word!r} does not fit here")
        if not 1 <= count <= LARGEST:
            raise Wrong(f"the count must be from 1 to {LARGEST}")
        return Amount(count, unit)  # type: ignore[arg-type]

    return Kind(f"a count with its unit, such as {example}", read)


def _unit_number(value: Any, unit: str) -> Any:
    match = (
        re.fullmatch(rf"([0-9]{{1,18}}(?:\.[0-9]+)?)\s+{unit}s?", value.strip())
        if isinstance(value, str)
        else None
    )
    if match is None:
        raise Wrong("the unit is missing" if isinstance(value, int) and not isinstance(value, bool) else "")
    return float(match.group(1)) if "." in match.group(1) else int(match.group(1))


def _read_steps(value: Any) -> int:
    return whole(1).read(_unit_number(value, "step"))


def _read_seconds(value: Any) -> float:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return number(above=0).read(value if plain else _unit_number(value, "second"))


STEPS = Kind("a count of steps such as '20 steps'", _read_steps)
SECONDS = Kind("a number of seconds above 0", _read_seconds)


def read_element(kind: Kind[T], values: Sequence[Any], index: int) -> T:
    """One element of a list; where it is wrong, the message says which one and what it is."""
    try:
        return kind.read(values[index])
    except Wrong as wrong:
        raise Wrong(f"element {index + 1} is {shown(values[index])}") from wrong


def _read_filled(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Wrong
    return value


def _read_texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_read_filled(value),)
    if not isinstance(value, list | tuple):
        raise Wrong
    return tuple(read_element(_FILLED, value, index) for index in range(len(value)))


_FILLED = Kind("text that is not empty", _read_filled)


TEXTS = Kind("text that is not empty, or a list of such texts", _read_texts)


class Report:
    """Collects the problems of one document. `origins` tells which params made a value."""

    def __init__(
        self,
        document: Document,
        problems: list[Problem],
        origins: Mapping[KeyPath, tuple[str, ...]] | None = None,
    ) -> None:
        self.document = document
        self.problems = problems
        self._origins = origins or {}

    def add(self, path: KeyPath, message: str) -> None:
        """Note a problem at a key path."""
        self.problems.append(self.place(path).problem(message))

    def place(self, path: KeyPath) -> Place:
        """Where a key path is in the file, and the params that its value comes from."""
        here = self.document.problem(path, "")
        return Place(here.where, here.file, here.line, self._origins.get(path, ()))

    def read(self, path: KeyPath, value: Any, kind: Kind[T], fallback: D) -> T | D:
        """The typed value; where it is of another kind, a problem and `fallback`."""
        if value is BROKEN:  # reported already
            return fallback
        try:
            return kind.read(value)
        except Wrong as wrong:
            hint = f"; {wrong}" if str(wrong) else ""
            self.add(path, f"found {shown(value)}, expected {kind.expected}{hint}")
            return fallback

    def section(self, path: KeyPath, value: Any, expected: str = "a mapping") -> Section:
        """The mapping at a path; anything else is a problem and reads as empty."""
        if isinstance(value, Mapping):
            return Section(self, path, value, True)
        if value is BROKEN:
            return Section(self, path, {}, False)
        self.add(path, f"found {shown(value)}, expected {expected}")
        return Section(self, path, {}, False)

    def finish(self) -> None:
        """Raise InputError with everything found, in the order of the file, if there is anything."""
        if self.problems:
            unique = dict.fromkeys(self.problems)
            raise InputError(sorted(unique, key=lambda problem: problem.line or 0))


class Section:
    """One mapping of the document, read key by key. `sound` is false where there was no mapping."""

    def __init__(self, report: Report, path: KeyPath, items: Mapping[Any, Any], sound: bool) -> None:
        self.report = report
        self.path = path
        self.items = items
        self.sound = sound
        self._taken: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self.items

    def problem(self, message: str, *keys: Key) -> None:
        """Note a problem here, or at a key below."""
        self.report.add((*self.path, *keys), message)

    def take(self, key: str, kind: Kind[T], default: D) -> T | D:
        """The value of a key that may be left out."""
        self._taken.add(key)
        if key not in self.items:
            return default
        return self.report.read((*self.path, key), self.items[key], kind, default)

    def need(self, key: str, kind: Kind[T], fallback: D) -> T | D:
        """The value of a key that must be there."""
        if key not in self.items and self.sound:
            self.problem(f"{key!r} is missing; expected {kind.expected}")
        return self.take(key, kind, fallback)

    def section(self, key: str, *, required: bool = False, expected: str = "a mapping") -> Section:
        """The mapping under a key; empty where the key is left out."""
        self._taken.add(key)
        if key in self.items:
            return self.report.section((*self.path, key), self.items[key], expected)
        if required and self.sound:
            self.problem(f"{key!r} is missing; expected {expected}")
        return Section(self.report, (*self.path, key), {}, not required)

    def names(self, kind: Kind[str]) -> list[str]:
        """Every key, where keys are names that the user chose."""
        found = []
        for key in self.items:
            self._taken.add(key)
            name = self.report.read((*self.path, key), key, kind, None)
            if name is not None:
                found.append(name)
        return found

    def close(self, known: Iterable[str], hint: Callable[[str], str | None] = lambda key: None) -> None:
        """Report every key that is not known; `hint` may say more about one."""
        known = list(known)
        for key in self.items:
            if key not in known and key not in self._taken:
                advice = hint(str(key)) or nearest(key, known, many=30)
                self.problem(f"unknown key {key!r}; {advice}", key)
