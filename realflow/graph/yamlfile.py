"""YAML files, read safely and with positions, and written so that they read back equal.

Plain values only: mappings, lists, text, numbers as in YAML 1.2 (`1e-5` is a number; `yes` and
`on` are text), true, false and null. Size and nesting are limited before anything is built;
aliases, tags and several documents in one file are refused. Nothing here knows what a graph is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from realflow.errors import InputError, Problem

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_DIGITS = 400

BROKEN: Any = type("Broken", (), {"__repr__": lambda self: "a value that could not be read"})()
"""Stands where a value could not be read, in documents whose problems are being collected."""

Key = str | int
KeyPath = tuple[Key, ...]

# The core schema of YAML 1.2.2, section 10.3.2.
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"(true|True|TRUE)|(?:false|False|FALSE)")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")
_NAN = re.compile(r"\.(?:nan|NaN|NAN)")

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # only its event parser is used


@dataclass(frozen=True)
class Document:
    """A parsed file: its plain `value`, and the 1-based line of every key path in it.

    `prefix` is where `value` lies in its file (`under`); paths given to the methods start there.
    """

    value: Any
    file: str = ""
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    prefix: KeyPath = ()

    def line(self, path: KeyPath) -> int | None:
        """The line of a key path, or of the nearest thing around it that has one."""
        full = (*self.prefix, *path)
        for end in range(len(full), -1, -1):
            if full[:end] in self.lines:
                return self.lines[full[:end]]
        return None

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A problem at a key path."""
        return Problem(message, where=_where((*self.prefix, *path)), file=self.file, line=self.line(path))

    def under(self, *path: Key) -> Document:
        """The part of the document at a path that exists."""
        value = self.value
        for key in path:
            value = value[key]
        return Document(value, self.file, self.lines, (*self.prefix, *path))


def load_yaml(path: Path, problems: list[Problem] | None = None) -> Document:
    """Read a YAML file of at most `MAX_BYTES`. Errors as in `parse_yaml`."""
    try:
        if not path.is_file():
            what = "this is a folder" if path.is_dir() else "there is no such file"
            raise InputError(Problem(f"{what}; expected a YAML file", file=str(path)))
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from error
    return parse_yaml(data, str(path), problems)


def parse_yaml(source: str | bytes, file: str = "", problems: list[Problem] | None = None) -> Document:
    """Parse one YAML document; `file` is what messages call it.

    Raises InputError where it cannot be read on. Lesser problems (a duplicate key, a number that is
    too large) are added to `problems` if that list is given, `BROKEN` standing in for the value, and
    raised together otherwise.
    """
    data = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
    if len(data) > MAX_BYTES:
        raise InputError(
            Problem(
                f"larger than {MAX_BYTES // 1024} KiB; a file like this holds settings, not data", file=file
            )
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise InputError(
            Problem(f"not UTF-8 text: {found}; save the file as UTF-8", "", file, line)
        ) from error
    builder = _Builder(text, file)
    try:
        document = builder.document()
    except yaml.YAMLError as error:
        raise InputError([*builder.problems, _syntax_problem(error, text, file)]) from error
    if problems is not None:
        problems.extend(builder.problems)
    elif builder.problems:
        raise InputError(builder.problems)
    return document


def _syntax_problem(error: yaml.YAMLError, text: str, file: str) -> Problem:
    """What the parser said, at its line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        if mark is not None:
            return Problem(f"not valid YAML: {said} (column {mark.column + 1})", "", file, mark.line + 1)
        return Problem(f"not valid YAML: {said}", file=file)
    if isinstance(error, yaml.reader.ReaderError):
        place = error.position if isinstance(error.position, int) else 0
        line = text.count("\n", 0, place) + 1
        code = error.character if isinstance(error.character, int) else ord(str(error.character)[0])
        return Problem(f"not valid YAML: character #x{code:04x} is not allowed", "", file, line)
    return Problem(f"not valid YAML: {error}", file=file)


def _line(event: yaml.Event) -> int:
    """The 1-based line that an event starts on."""
    assert event.start_mark is not None
    return event.start_mark.line + 1


def _where(path: KeyPath) -> str:
    """`calls.train.model`, with keys that are no sensible names cut short."""
    return ".".join(key if len(key) <= 60 else f"{key[:57]}..." for key in map(str, path))


class _Builder:
    """Plain values from the parser's events, which are drawn one by one: a file that nests too
    deep is refused before it is parsed any further."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.lines: dict[KeyPath, int] = {}
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=_LOADER)

    def document(self) -> Document:
        next(self._events)  # the start of the stream
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            return Document(None, self.file, {(): 1})
        event = next(self._events)
        self.lines[()] = _line(event)
        value = self._value(event, (), 0)
        next(self._events)  # the end of the document
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            self._fatal(event, (), "a second document starts here; expected one document in a file")
        return Document(value, self.file, self.lines)

    def _problem(self, event: yaml.Event, path: KeyPath, message: str) -> Problem:
        return Problem(message, _where(path), self.file, _line(event))

    def _fatal(self, event: yaml.Event, path: KeyPath, message: str) -> None:
        raise InputError([*self.problems, self._problem(event, path, message)])

    def _value(self, event: yaml.Event, path: KeyPath, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            self._fatal(event, path, f"*{event.anchor}: aliases are not read; write the value out")
        assert isinstance(event, yaml.NodeEvent)
        if event.anchor is not None:
            self._fatal(event, path, f"&{event.anchor}: anchors are not read; use params and ${{name}}")
        if (tag := getattr(event, "tag", None)) is not None:
            self._fatal(event, path, f"the tag {tag!r} is not read; write a plain value")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if depth >= MAX_DEPTH:
            self._fatal(event, (), f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path, depth)
        return self._mapping(path, depth)

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> Any:
        if event.style:  # quoted or a block: text
            return event.value
        try:
            return plain_scalar(event.value)
        except ValueError as error:
            self.problems.append(self._problem(event, path, str(error)))
            return BROKEN

    def _sequence(self, path: KeyPath, depth: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            here = (*path, len(items))
            self.lines[here] = _line(event)
            items.append(self._value(event, here, depth + 1))
        return items

    def _mapping(self, path: KeyPath, depth: int) -> dict[Key, Any]:
        items: dict[Key, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._value(event, path, depth + 1)
            if not isinstance(key, str | int) or isinstance(key, bool):
                message = "a key must be text or a whole number; put quotes around it to make it text"
                self.problems.append(self._problem(event, path, message))
                key = f"<line {_line(event)}>"
            here = (*path, key)
            twice = key in items
            if twice:
                message = f"the key is given twice, first on line {self.lines[here]}; remove one"
                self.problems.append(self._problem(event, here, message))
            else:
                self.lines[here] = _line(event)
            value = self._value(next(self._events), here, depth + 1)
            if not twice:
                items[key] = value
        return items


def plain_scalar(text: str) -> Any:
    """What an unquoted scalar means in YAML 1.2. Raises ValueError for a number out of range."""
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match.group(1) is not None
    whole = _INT.fullmatch(text)
    if (whole or _FLOAT.fullmatch(text)) and len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} characters is too long")
    if whole:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        if math.isinf(number := float(text)):
            raise ValueError(f"{text} is too large for a number")
        return number
    if match := _INF.fullmatch(text):
        return float(match.group(1) + "inf")
    return math.nan if _NAN.fullmatch(text) else text


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or 1.2 would not read back as the same text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern in (("bool", _BOOL), ("int", _INT), ("float", _FLOAT), ("float", _INF), ("float", _NAN)):
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})$"), list("-+.0123456789tTfF")
    )


def dump_yaml(value: Any, *, width: int = 100) -> str:
    """Plain values as YAML text that `parse_yaml` reads back equal; keys keep their order."""
    return str(
        yaml.dump(
            value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=None
        )
    )
