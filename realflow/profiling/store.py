"""Where profiles lie, which machine they are of, and how rows become a profile's file. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import realflow
from realflow.models.paths import cache_dir
from realflow.profiling.request import Subject

FORMAT = 1
CONSTANTS = {"micro_batch": "micro_batch", "minibatch": "train_step"}
"""`doing` of the rows `train_step` -> the constant that the planner knows."""


def machine(kind: str) -> dict[str, Any]:
    """This machine, as far as it matters to how fast it is; `kind` is that of its devices."""
    return {
        "kind": kind,
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "architecture": platform.machine(),
        "gpus": [] if kind == "cpu" else _gpus(),
    }


def default_path(found: Mapping[str, Any]) -> Path:
    """Where the profile of a machine (`machine`) is kept."""
    text = json.dumps(found, sort_keys=True)
    return cache_dir() / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def stored(kind: str) -> Path | None:
    """This machine's profile, if there is one."""
    path = default_path(machine(kind))
    return path if path.is_file() else None


def document(
    found: Mapping[str, Any],
    subjects: Iterable[Subject],
    rows: Iterable[Mapping[str, Any]],
    constants: Mapping[str, float],
) -> dict[str, Any]:
    """The content of a profile's file, its hash included."""
    listed = list(rows)
    content: dict[str, Any] = {
        "format": FORMAT,
        "machine": dict(found),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "commit": _commit(),
        "models": {one.name: {"config": dict(one.config), "dtype": one.dtype} for one in subjects},
        "constants": {**_constants(listed), **constants},
        "tables": tables(row for row in listed if row["what"] != "train_step"),
    }
    text = json.dumps(content, sort_keys=True)
    return {**content, "hash": hashlib.sha256(text.encode()).hexdigest()[:16]}


def tables(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one thing under one set of circumstances together; a point that was measured for several
    models (parameters of an optimizer) once, with the mean."""
    groups: dict[str, dict[str, Any]] = {}
    points: dict[str, dict[tuple[float, ...], list[tuple[float, float]]]] = {}
    for row in rows:
        group = json.dumps([row["what"], row["key"]], sort_keys=True)
        groups.setdefault(group, {"what": row["what"], "key": row["key"], "axes": list(row["axes"])})
        same = points.setdefault(group, {}).setdefault(tuple(row["at"]), [])
        same.append((row["seconds"], row["noise"]))
    for group, table in groups.items():
        table["points"] = [
            [*at, *(statistics.fmean(column) for column in zip(*found, strict=True))]
            for at, found in sorted(points[group].items())
        ]
    return list(groups.values())


def write(content: Mapping[str, Any], path: Path) -> Path:
    """Write a profile beside and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(beside, path)
    return path


def _constants(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds that do not depend on the circumstances that they were measured under."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["what"] == "train_step":
            found.setdefault(CONSTANTS[row["key"]["doing"]], []).append(row["seconds"])
    return {name: statistics.median(values) for name, values in found.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    keys = ("vendor_id", "cpu family", "model", "model name", "stepping")
    told = dict(line.partition(":")[::2] for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in told.items()}
    return " ".join(values[key] for key in keys if key in values)


def _gpus() -> list[str]:
    """The models of this machine's GPUs, told by the driver's files."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]


def _commit() -> str:
    """RealFlow's commit, empty where it was installed without."""
    folder = Path(realflow.__file__).parent.parent
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
