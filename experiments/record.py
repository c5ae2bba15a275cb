"""Store a study's results with what is needed to judge them: machine, versions, commit, date.

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # experiments/
from record import record
record(Path(__file__).parent / "results" / "speed.json", {"tokens_per_second": 712.4})
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "realflow", "numpy")


def record(path: Path | str, table: Mapping[str, Any]) -> Path:
    """Write `table` to `path` as JSON beside `date`, `machine`, `versions` and `commit`.

    The file appears whole or not at all. Raises ValueError for NaN and infinity, which JSON cannot
    hold, and TypeError for values that JSON has no form for.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "results": dict(table),
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def machine() -> dict[str, Any]:
    """The machine: processor model, cores that this process may use, memory, NVIDIA GPUs."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide results; None for one not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict[str, Any] | None:
    """The repository's commit, and whether tracked files differ from it; None outside of git."""
    try:
        head = _output("git", "rev-parse", "HEAD")
        changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"id": head, "changed": bool(changed)}


def _output(*command: str) -> str:
    here = Path(__file__).resolve().parent
    return subprocess.run(
        command, cwd=here, check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _gpus() -> list[str]:
    try:
        names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        return []
    return [name for name in names.splitlines() if name]
