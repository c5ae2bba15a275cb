"""Errors that people read.

    RealFlowError
    ├── InputError (also ValueError)   the user's file, argument or data is wrong; exit code 2
    └── RunError (also RuntimeError)   a run failed although its input was accepted; exit code 1

An `InputError` carries every problem found in one input, so that they are mended in one go.
Assertions, not these classes, guard our own invariants.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input.

    `where` names the file, key or call ("calls.train.model"); `line` is 1-based, if known.
    `message` says what was found, what was expected and what to do.
    """

    message: str
    where: str = ""
    file: str = ""
    line: int | None = None

    def __str__(self) -> str:
        place = self.file
        if self.line is not None:
            place = f"{place}:{self.line}" if place else f"line {self.line}"
        parts = [part for part in (place, self.where) if part]
        return ": ".join([*parts, self.message])


class RealFlowError(Exception):
    """Base of all errors that RealFlow raises on purpose."""


class InputError(RealFlowError, ValueError):
    """The input is wrong. `problems` lists everything that was found."""

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = [Problem(problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RunError(RealFlowError, RuntimeError):
    """A run failed; the message names call, rank and cause."""
