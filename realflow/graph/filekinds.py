"""Graph, plan or cluster file: told apart, so that a command given the wrong one says so in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from realflow.errors import InputError
from realflow.graph.yamlfile import Document

FileKind = Literal["graph", "plan", "cluster"]

_COMMANDS: Mapping[FileKind, str] = {
    "graph": "realflow check, draw, plan and run take it",
    "plan": "realflow explain and run take it",
    "cluster": "realflow plan takes it as --cluster",
}
_MAKE: Mapping[FileKind, str] = {
    "graph": "a graph (name, models, data, calls, steps)",
    "plan": "a plan, which realflow plan GRAPH -o plan.yaml makes",
    "cluster": "a cluster file (a mapping with nodes)",
}


def file_kind(value: Any) -> FileKind | None:
    """What a document is meant to be, by the keys that only one kind has; None where that is unclear."""
    if not isinstance(value, Mapping):
        return None
    if "graph" in value and "cluster" in value:
        return "plan"
    if "calls" in value and "graph" not in value and ("models" in value or "data" in value):
        return "graph"
    return "cluster" if "nodes" in value and "calls" not in value else None


def refuse_other(document: Document, expected: FileKind) -> None:
    """Raise InputError, one line, where a document is of another kind than `expected`."""
    found = file_kind(document.value)
    if found is not None and found != expected:
        raise InputError(
            document.problem((), f"this is a {found} file: {_COMMANDS[found]}; expected {_MAKE[expected]}")
        )
