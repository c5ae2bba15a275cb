"""Is the demo's searched plan as fast as those that people would write by hand?

    python experiments/demo/plans.py          # four plans in turn, 3 rounds of 8 steps: about 8 minutes
    python experiments/demo/plans.py --rounds 2 --steps 4

Plans as `make demo` does, with the profile of this machine (`realflow profile grpo` makes one), and runs that
plan in turn with d2 everywhere, p2 everywhere, and rollout and training on one rank each. A plan's step is
the median over its rounds of each round's median step; the repeat noise is the largest half distance of two
rounds of a plan, as a part of its step. Exit code 1 where another plan is faster by more than that.
The table goes to results/plans.json, with machine, versions and commit.
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
from realflow.planfile import Plan  # noqa: E402

SEARCHED = "searched"
BY_HAND: Mapping[str, Mapping[str, str]] = {
    "d2": {"*": "d2"},
    "p2": {"*": "p2"},
    "apart": {"*": "d1@1", "rollout": "d1@0"},
}
WARM = 2
"""Steps at the begin of a run that are not counted."""


def main() -> int:
    """Plan, run in turn, print and store; returns the exit code."""
    args = _parser().parse_args()
    overrides = [f"steps={args.steps}", f"seed={args.seed}"]
    plans = {SEARCHED: plan("grpo", devices=2, overrides=overrides, seed=args.seed)}
    plans |= {
        name: plan("grpo", devices=2, layouts=dict(layouts), overrides=overrides)
        for name, layouts in BY_HAND.items()
    }
    steps: dict[str, list[float]] = {name: [] for name in plans}
    for index in range(args.rounds):
        for name, made in plans.items():
            steps[name].append(_seconds(made, Path("runs") / "plans" / name))
            print(f"round {index + 1}: {name} {steps[name][-1]:.3f} s a step", flush=True)
    found = judge(steps)
    settings = {"steps": args.steps, "rounds": args.rounds, "seed": args.seed}
    rows = {name: _row(made, steps[name]) for name, made in plans.items()}
    record(HERE / "results" / "plans.json", {"settings": settings, "plans": rows, **found})
    _show(rows, found)
    return 0 if found["met"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The demo's searched plan against plans made by hand.")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each plan (default: 3)")
    parser.add_argument("--seed", type=int, default=1, help="seed of search and runs (default: 1)")
    return parser


def _seconds(made: Plan, folder: Path) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    rows = run(made, run_dir=folder, quiet=True).metrics
    return statistics.median(row["timing_s/step"] for row in rows[WARM:] or rows)


def judge(steps: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Repeat noise, and the plans that are faster than the searched one by more than it."""
    middle = {name: statistics.median(found) for name, found in steps.items()}
    noise = max((max(found) - min(found)) / 2 / middle[name] for name, found in steps.items())
    faster = [name for name in steps if middle[SEARCHED] > middle[name] * (1 + noise)]
    return {"noise": noise, "faster": faster, "met": not faster}


def _row(made: Plan, steps: Sequence[float]) -> dict[str, Any]:
    return {
        "calls": {
            name: f"{how.layout}@{','.join(map(str, how.ranks))}"
            for name, how in made.calls.items()
            if made.graph.call(name).model
        },
        "predicted": made.step_seconds,
        "steps": list(steps),
        "measured": statistics.median(steps),
    }


def _show(rows: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    table = Table("plan", "calls", "predicted s", "measured s")
    for name, row in rows.items():
        calls = ", ".join(f"{call} {where}" for call, where in row["calls"].items())
        table.add_row(name, calls, f"{row['predicted']:.3f}", f"{row['measured']:.3f}")
    console = Console(width=120)
    console.print(table)
    verdict = "none" if found["met"] else ", ".join(found["faster"])
    console.print(f"repeat noise {found['noise']:.1%}; faster than the searched plan by more: {verdict}")


if __name__ == "__main__":
    sys.exit(main())
