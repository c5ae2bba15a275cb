"""The places in a run's directory, and the promise that nothing in it is half-written."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from realflow.errors import InputError
from realflow.files import file_digest
from realflow.graph import Graph, graph_to_mapping
from realflow.planfile import Plan, write_plan
from realflow.runtime.carried import Carried, restored

PARTIAL = ".partial"
CURSOR = "cursor.json"
RENDEZVOUS_FILE = ".rendezvous"
"""How rank 0 of a supervised job finds the master; read once and removed."""


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
    """Remove what was being written when a run died: checkpoints, and files not yet renamed."""
    for path in (run_dir / "checkpoints").glob(f"{PARTIAL}-*"):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in (".*.tmp", f"*{PARTIAL}"):
        for path in run_dir.glob(pattern):
            path.unlink(missing_ok=True)


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Hold a run's directory for one supervisor. Raises InputError while another one holds it."""
    descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"{run_dir}: another realflow run is at work in this directory") from None
    finally:
        os.close(descriptor)


def cursor(graph: Graph, steps: int, carried: Carried) -> dict[str, Any]:
    """Where the data stands after `steps` steps, what ids and draws depend on, and what functions keep."""
    found = _identity(graph, steps) | {"next_prompt": carried.next_prompt}
    states = {name: dict(state) for name, state in carried.states.items()}
    return found | ({"states": states} if states else {})


def _identity(graph: Graph, steps: int) -> dict[str, int]:
    """What must be the same in a run that goes on."""
    return {"steps": steps, "prompts": graph.prompts, "samples": graph.samples, "seed": graph.seed}


def read_carried(graph: Graph, checkpoint: Path) -> Carried:
    """What the steps before a checkpoint have left. Raises InputError where it does not fit `graph`."""
    found = json.loads((checkpoint / CURSOR).read_text(encoding="utf-8"))
    try:
        return restored(graph, found["next_prompt"], found.get("states", {}))
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from None


def check_cursor(graph: Graph, checkpoint: Path, steps: int) -> None:
    """Raise InputError where `graph` would not go on with the ids and draws of the checkpoint."""
    path = checkpoint / CURSOR
    if not path.is_file():
        raise InputError(f"checkpoint {checkpoint}: {CURSOR} is missing")
    before = json.loads(path.read_text(encoding="utf-8"))
    now = _identity(graph, steps)
    changed = [
        f"{name} was {before.get(name)} and is {now[name]}" for name in now if before.get(name) != now[name]
    ]
    if changed:
        raise InputError(
            f"{checkpoint} cannot be continued with this graph: {'; '.join(changed)}. Samples would get ids "
            "that were used already; start a new run from the checkpoint's weights instead"
        )
    read_carried(graph, checkpoint)


def checkpoint_path(run_dir: Path, steps: int) -> Path:
    """The checkpoint after `steps` steps."""
    return run_dir / "checkpoints" / f"step-{steps:06d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    named = [path for path in found if re.fullmatch(r"step-\d+", path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(run_dir: Path) -> tuple[int, Path]:
    """The newest checkpoint and the number of steps it has seen, its files compared with checksums.

    Raises InputError where there is none, or where a file is missing or damaged.
    """
    found = checkpoints(run_dir)
    if not found:
        raise InputError(f"{run_dir} has no checkpoint to continue from; start a new run in its place")
    path = found[-1]
    steps = int(path.name.removeprefix("step-"))
    for name, digest in json.loads((path / "checksums.json").read_text(encoding="utf-8")).items():
        file = path / name
        if not file.is_file():
            raise InputError(f"checkpoint {path}: {name} is missing")
        if file_digest(file) != digest:
            raise InputError(f"checkpoint {path}: {name} is damaged (its checksum differs)")
    return steps, path


def prepare_resume(plan: Plan, run_dir: Path) -> tuple[int, Path]:
    """Make a run's directory ready to continue under `plan`: (steps done, checkpoint).

    Lines of metrics.jsonl and samples.jsonl for steps that will be run again are taken out.
    """
    steps, checkpoint = latest_checkpoint(run_dir)
    check_cursor(plan.graph, checkpoint, steps)
    if steps >= plan.graph.steps:
        raise InputError(f"{run_dir} has done its {steps} steps; give more with steps=...")
    remove_partial(run_dir)
    for name in ("error.txt", RENDEZVOUS_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run_dir / name).exists():
            _rewind(run_dir / name, steps)
    _write(plan, run_dir)
    return steps, checkpoint


def _rewind(path: Path, steps: int) -> None:
    """Keep the whole lines of steps before `steps` (a crash of the machine can leave a part of one)."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    with path.open(encoding="utf-8") as lines, partial.open("w", encoding="utf-8") as kept:
        for line in lines:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                continue
            if step < steps and line.endswith("\n"):
                kept.write(line)
    os.replace(partial, path)
