"""Declarations of the built-in rewards that take more than a completion and its answer (see `builtins`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from realflow.graph.types import FieldUse, FunctionDecl, Range

_NOT_NEGATIVE = Range(least=0)
_POSITIVE = Range(above=0)
_COMPLETION = FieldUse("completion", "completion", "sample", "text")
_PARTS = ("first", "second", "third", "fourth", "fifth", "sixth")
_ON_TIMEOUT = ("missing", "wrong", "error")


def _reward(
    name: str,
    reads: tuple[FieldUse, ...],
    options: Mapping[str, Any],
    ranges: Mapping[str, Range] | None = None,
    choices: Mapping[str, tuple[Any, ...]] | None = None,
) -> FunctionDecl:
    return FunctionDecl(
        f"rewards.{name}",
        "function",
        reads,
        (FieldUse("rewards", "rewards", "sample", "float"),),
        options=options,
        ranges=ranges or {},
        choices=choices or {},
    )


def _column(name: str, dtype: Any = "any", field: str = "") -> FieldUse:
    return FieldUse(name, field or name, "sample", dtype)


REWARDS = (
    _reward(
        "code",
        (_COMPLETION, _column("tests")),
        {"partial": False, "seconds": 10.0, "megabytes": 1024, "tolerance": 1e-6, "workers": 0},
        {"seconds": _POSITIVE, "tolerance": _NOT_NEGATIVE},
    ),
    _reward(
        "humaneval",
        (_COMPLETION, _column("prompt"), _column("test", "text"), _column("entry_point", "text")),
        {"seconds": 10.0, "megabytes": 1024, "workers": 0},
        {"seconds": _POSITIVE},
    ),
    _reward(
        "countdown",
        (_COMPLETION, _column("numbers"), _column("target")),
        {"use_all": False, "format_score": 0.0},
        {"format_score": Range(least=0, most=1)},
    ),
    _reward(
        "format",
        (_COMPLETION,),
        {"tags": None, "pattern": None, "seconds": 1.0},
        {"seconds": _POSITIVE},
    ),
    _reward(
        "overlong",
        (FieldUse("loss_mask", "loss_mask", "token", "bool"),),
        {"limit": 20480, "buffer": 4096, "factor": 1.0},
        {"buffer": Range(least=1), "factor": _NOT_NEGATIVE},
    ),
    _reward(
        "gym",
        (_COMPLETION, _column("entry")),
        {"task": None, "seconds": 10.0, "on_timeout": "missing"},
        {"seconds": _POSITIVE},
        {"on_timeout": _ON_TIMEOUT},
    ),
    _reward(
        "weighted",
        tuple(FieldUse(part, part, "sample", "float", optional=part != "first") for part in _PARTS),
        {"weights": None, "names": None, "missing": "sample"},
        choices={"missing": ("sample", "part")},
    ),
)
"""In the order of docs/rewards.md."""
