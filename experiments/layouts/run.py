"""The demo's graph under different layouts: does it learn, how long is a step, what does realloc take?

    python experiments/layouts/run.py                         # all layouts, 45 steps each
    python experiments/layouts/run.py --layouts t2 p2/d2 --steps 4 --prompts 4

Results go to results/<layout>.json, with machine, versions and commit. Runs are in runs/layouts/.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # the first: experiments/planner is no package

from record import record  # noqa: E402

from realflow.api import plan, run  # noqa: E402

LAYOUTS: Mapping[str, tuple[int, Mapping[str, str]]] = {
    "d2": (2, {"*": "d2"}),
    "t2": (2, {"*": "t2"}),
    "t3": (3, {"*": "t3"}),
    "p2": (2, {"*": "p2"}),
    "d2p2": (4, {"*": "d2p2"}),
    "p2/d2": (2, {"*": "d2", "train": "p2"}),
}
"""Name -> devices, and the layout of each call (`*`: of all others)."""

FEW = 5
"""Steps at the begin and at the end whose rewards are compared."""


def main() -> int:
    """Run the layouts one after the other; returns the exit code."""
    args = _parser().parse_args()
    found = {}
    for name in args.layouts:
        found[name] = measure(name, args.steps, args.prompts, args.seed)
        path = HERE / "results" / f"{name.replace('/', '-')}-{args.steps}.json"
        settings = {"layout": name, "steps": args.steps, "prompts": args.prompts, "seed": args.seed}
        record(path, {"settings": settings, **found[name]})
    _show(found)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The demo's graph under different layouts.")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=45, help="training steps (default: 45, as in the demo)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts in a step (default: 8)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the runs (default: 1)")
    return parser


def measure(name: str, steps: int, prompts: int, seed: int) -> dict[str, Any]:
    """One run, in a directory that is made anew."""
    devices, layouts = LAYOUTS[name]
    overrides = [f"steps={steps}", f"prompts={prompts}", f"seed={seed}"]
    made = plan("grpo", devices=devices, layouts=layouts, overrides=overrides)
    folder = Path("runs") / "layouts" / name.replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    rows = run(made, run_dir=folder).metrics
    moved = sum(realloc.bytes for realloc in made.reallocs)
    return summary(rows) | {"realloc_bytes_planned": moved}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run's metrics say. The first step, which warms up, counts for rewards alone."""
    rewards = [row["critic/rewards/mean"] for row in rows]
    few = min(FEW, max(1, len(rewards) // 2))
    first, last = (statistics.fmean(part) for part in (rewards[:few], rewards[-few:]))
    timed = rows[1:] or rows
    seconds = [row["timing_s/step"] for row in timed]
    realloc = [
        sum(v for k, v in row.items() if _is_realloc(k, "seconds") or _is_realloc(k, "verify_seconds"))
        for row in timed
    ]
    return {
        "reward_first": first,
        "reward_last": last,
        "reward_gain": last - first,
        "steps_averaged": few,
        "step_seconds": statistics.median(seconds),
        "calls_seconds": {
            name.removeprefix("timing_s/"): statistics.median(row.get(name, 0.0) for row in timed)
            for name in timed[-1]
            if name.startswith("timing_s/") and name != "timing_s/step"
        },
        "realloc_seconds": statistics.median(realloc),
        "realloc_bytes": max(sum(v for k, v in row.items() if _is_realloc(k, "bytes")) for row in timed),
        "realloc_share": sum(realloc) / sum(seconds),
    }


def _is_realloc(name: str, what: str) -> bool:
    return name.startswith("realloc/") and name.rsplit("/", 1)[1] == what


def _show(found: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("layout", "reward first", "last", "step s", "realloc s", "share of the step")
    for name, row in found.items():
        table.add_row(
            name,
            f"{row['reward_first']:.3f}",
            f"{row['reward_last']:.3f}",
            f"{row['step_seconds']:.2f}",
            f"{row['realloc_seconds']:.3f}",
            f"{row['realloc_share']:.2%}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
