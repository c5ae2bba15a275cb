"""The places in a run's directory, and the promise that nothing in it is half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

from realflow.errors import InputError
from realflow.planfile import Plan, write_plan

PARTIAL = ".partial"


def prepare(plan: Plan, run_dir: Path) -> None:
    """Make the run's directory with its plan. Raises InputError if it is in use or cannot be made."""
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise InputError(
            f"{run_dir} exists and is not empty; choose another directory with --run-dir or --name"
        )
    try:
        (run_dir / "checkpoints").mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{run_dir} cannot be made: {error.strerror}") from None
    write_plan(plan, run_dir / "plan.yaml")


def partial_directory(run_dir: Path, name: str) -> Path:
    """Where a checkpoint is written until all ranks have written their part."""
    return run_dir / "checkpoints" / f"{PARTIAL}-{name}"


def remove_partial(run_dir: Path) -> None:
    """Remove checkpoints that were being written when a run died."""
    for path in (run_dir / "checkpoints").glob(f"{PARTIAL}-*"):
        shutil.rmtree(path, ignore_errors=True)
