"""The places in a run's directory, and the promise that nothing in it is half-written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import yaml

from realflow.errors import InputError
from realflow.graph import graph_to_mapping
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
    _write(plan, run_dir)


def _write(plan: Plan, run_dir: Path) -> None:
    write_plan(plan, run_dir / "plan.yaml")
    text = yaml.safe_dump(graph_to_mapping(plan.graph), sort_keys=False, allow_unicode=True)
    (run_dir / "graph.yaml").write_text(text, encoding="utf-8")


def partial_directory(run_dir: Path, name: str) -> Path:
    """Where a checkpoint is written until all ranks have written their part."""
    return run_dir / "checkpoints" / f"{PARTIAL}-{name}"


def remove_partial(run_dir: Path) -> None:
    """Remove checkpoints that were being written when a run died."""
    for path in (run_dir / "checkpoints").glob(f"{PARTIAL}-*"):
        shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(run_dir: Path) -> tuple[int, Path]:
    """The newest checkpoint and the number of steps it has seen, its files compared with checksums.

    Raises InputError where there is none, or where a file is missing or damaged.
    """
    found = {
        int(match[1]): path
        for path in (run_dir / "checkpoints").glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    if not found:
        raise InputError(f"{run_dir} has no checkpoint to continue from")
    steps, path = max(found.items())
    for name, digest in json.loads((path / "checksums.json").read_text(encoding="utf-8")).items():
        file = path / name
        if not file.is_file():
            raise InputError(f"checkpoint {path}: {name} is missing")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise InputError(f"checkpoint {path}: {name} is damaged (its checksum differs)")
    return steps, path


def prepare_resume(plan: Plan, run_dir: Path) -> tuple[int, Path]:
    """Make a run's directory ready to continue under `plan`: (steps done, checkpoint).

    Lines of metrics.jsonl and samples.jsonl for steps that will be run again are taken out.
    """
    steps, checkpoint = latest_checkpoint(run_dir)
    if steps >= plan.graph.steps:
        raise InputError(f"{run_dir} has done its {steps} steps; give more with steps=...")
    remove_partial(run_dir)
    (run_dir / "error.txt").unlink(missing_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = run_dir / name
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] < steps]
            partial = run_dir / f"{name}{PARTIAL}"
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, path)
    _write(plan, run_dir)
    return steps, checkpoint
