"""Calls of the command line, and what stands in for the launcher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from realflow.cli import main


@dataclass
class Launched:
    """What was asked of the launcher or the worker that stand in for the real ones."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    error: BaseException | None = None
    code: int = 0


def ok(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must succeed; return what it printed."""
    code = main(argv)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> list[str]:
    """Run a command that must fail; return the lines on stderr."""
    found = main(argv)
    captured = capsys.readouterr()
    assert found == code
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert lines and all(line.startswith("realflow: ") for line in lines)
    return lines
