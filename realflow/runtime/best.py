"""The checkpoint with the best evaluation, beside the newest ones: `checkpoints/best`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from realflow.runtime.directory import partial_directory

BEST = "best"
TOLD = "best.json"
"""What it has beside the files of its checkpoint: the steps done, and the mean reward."""


def keep_if_best(run_dir: Path, checkpoint: Path, steps: int, reward: float) -> bool:
    """Keep a checkpoint as the best if no evaluation before has had so much; returns whether it is.

    Its files are links to those of the checkpoint (copies where the file system has no links), so that they
    stay when that one is removed.
    """
    best = run_dir / "checkpoints" / BEST
    before = read_best(run_dir)
    if before is not None and reward <= before[1]:
        return False
    partial, old = partial_directory(run_dir, BEST), partial_directory(run_dir, f"{BEST}-before")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(checkpoint, partial, copy_function=_link)
    (partial / TOLD).write_text(json.dumps({"step": steps, "reward": reward}) + "\n", encoding="utf-8")
    if best.exists():
        os.rename(best, old)
    os.rename(partial, best)
    shutil.rmtree(old, ignore_errors=True)
    return True


def read_best(run_dir: Path) -> tuple[int, float] | None:
    """Steps done and mean reward of the best checkpoint; None where none was kept."""
    path = run_dir / "checkpoints" / BEST / TOLD
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return int(found["step"]), float(found["reward"])


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # the file system has no links, or no more of this file
        shutil.copy2(source, target)
    return target
