"""`params` of a graph file: overrides from the command line, and `${name}` in values.

`${name}` alone keeps the parameter's type; inside other text it is written into it. `$${` is a
literal `${`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from realflow.errors import InputError, Problem
from realflow.graph.schema import nearest
from realflow.graph.yamlfile import BROKEN, MAX_DEPTH, Document, KeyPath, parse_yaml

_REFERENCE = re.compile(r"\$\$\{|\$\{([^{}\n]*)\}|\$\{")


def apply_params(
    document: Document, overrides: Sequence[str], problems: list[Problem]
) -> tuple[Document, dict[KeyPath, tuple[str, ...]]]:
    """The document with overrides set under `params` and every `${name}` replaced.

    Returns it with the names of the params that each value came from. Problems (an unknown name or
    override, a wrong reference) are added to `problems`.
    """
    params = document.value.get("params", {})
    if not isinstance(params, Mapping):
        return document, {}  # the reader of the graph says what is wrong
    chosen = _override(document, params, overrides, problems)
    replacer = _Replacer(document, chosen, problems)
    value: dict[Any, Any] = {}
    for key, item in document.value.items():
        if key == "params":
            value[key] = {name: _literal(document, (key, name), of, problems) for name, of in chosen.items()}
        else:
            value[key] = replacer.replace(item, (key,))
    used = {name for names in replacer.origins.values() for name in names}
    for name in {override.partition("=")[0].strip() for override in overrides} & (chosen.keys() - used):
        problems.append(
            Problem(
                f"override {name!r} changes nothing: the graph nowhere says ${{{name}}}", file=document.file
            )
        )
    return Document(value, document.file, document.lines, document.prefix), replacer.origins


def escape(value: Any) -> Any:
    """A plain value in which `${` is written so that it is read back as itself."""
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, Mapping):
        return {key: escape(item) for key, item in value.items()}
    return [escape(item) for item in value] if isinstance(value, list | tuple) else value


def _override(
    document: Document, params: Mapping[str, Any], overrides: Sequence[str], problems: list[Problem]
) -> dict[str, Any]:
    """`params` with `key=value` texts applied; a value is read as YAML 1.2."""
    chosen = dict(params)
    seen: set[str] = set()
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals:
            problems.append(Problem(f"override {override!r}: expected key=value, such as lr=1e-5"))
        elif name not in params:
            problems.append(
                Problem(f"override {override!r}: no such key under params; {nearest(name, params)}")
            )
        elif name in seen:
            problems.append(Problem(f"override {override!r}: {name} is given twice"))
        else:
            chosen[name] = _override_value(override, text, params[name], problems)
        seen.add(name)
    return chosen


def _override_value(override: str, text: str, default: Any, problems: list[Problem]) -> Any:
    """A value from the command line; where the default is text, the text as it stands (unless it is
    in quotes), so that `name=123` is text."""
    if isinstance(default, str) and text[:1] not in ("'", '"'):
        return escape(text)
    try:
        return escape(parse_yaml(text).value)
    except InputError as error:
        problems.extend(Problem(f"override {override!r}: {problem.message}") for problem in error.problems)
        return default


def _literal(document: Document, path: KeyPath, value: Any, problems: list[Problem]) -> Any:
    """A value under `params`: it may hold no reference itself."""

    def lookup(name: str) -> Any:
        problems.append(
            document.problem(path, f"${{{name}}}: a param cannot refer to another one; write its value")
        )
        return BROKEN

    return _walk(value, path, lambda text, at: _expand(text, lookup, document, at, problems))


class _Replacer:
    def __init__(self, document: Document, params: Mapping[str, Any], problems: list[Problem]) -> None:
        self.document = document
        self.params = params
        self.problems = problems
        self.origins: dict[KeyPath, tuple[str, ...]] = {}

    def replace(self, value: Any, path: KeyPath) -> Any:
        """The value with every reference in it replaced."""
        return _walk(value, path, self._text)

    def _text(self, text: str, path: KeyPath) -> Any:
        names: list[str] = []

        def lookup(name: str) -> Any:
            if name not in self.params:
                message = f"${{{name}}}: no such key under params; {nearest(name, map(str, self.params))}"
                self.problems.append(self.document.problem(path, message))
                return BROKEN
            names.append(name)
            return _unescaped(self.params[name])

        result = _expand(text, lookup, self.document, path, self.problems)
        if names:
            self.origins[path] = tuple(names)
        return result


def _expand(
    text: str, lookup: Callable[[str], Any], document: Document, path: KeyPath, problems: list[Problem]
) -> Any:
    """One text with its references looked up; a value of any type where the text is one reference.

    `BROKEN` where a reference could not be followed (which has been reported).
    """
    alone = _REFERENCE.fullmatch(text)
    if alone and alone.group(1) is not None:
        return lookup(alone.group(1).strip())
    parts: list[str] = []
    start = 0
    for match in _REFERENCE.finditer(text):
        parts.append(text[start : match.start()])
        start = match.end()
        if match.group() == "$${":
            parts.append("${")
            continue
        if match.group(1) is None:
            problems.append(
                document.problem(path, "'${' without '}'; expected ${name}, or $${ for the text itself")
            )
            return BROKEN
        found = lookup(match.group(1).strip())
        if isinstance(found, Mapping | list):
            problems.append(
                document.problem(path, f"{match.group()}: a list or mapping cannot stand inside a text")
            )
        if found is BROKEN or isinstance(found, Mapping | list):
            return BROKEN
        parts.append(_scalar_text(found))
    return "".join([*parts, text[start:]])


def _scalar_text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unescaped(value: Any) -> Any:
    return _walk(value, (), lambda text, _: text.replace("$${", "${"))


def _walk(value: Any, path: KeyPath, of_text: Callable[[str, KeyPath], Any]) -> Any:
    """A copy of plain values with `of_text(text, path)` in place of every text."""
    if len(path) > MAX_DEPTH + 2:
        raise InputError(f"{'.'.join(map(str, path[:3]))}: nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        return of_text(value, path)
    if isinstance(value, Mapping):
        return {key: _walk(item, (*path, key), of_text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(item, (*path, index), of_text) for index, item in enumerate(value)]
    return value
