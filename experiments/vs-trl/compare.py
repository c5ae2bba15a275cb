"""A GRPO step of RealFlow against TRL's GRPOTrainer: both sides in turn, one table.

    experiments/vs-trl/setup.sh
    .venv/bin/python experiments/vs-trl/compare.py --model DIRECTORY

Each round starts each side as a process of its own, one after the other, so that a slow minute of
the machine meets both; the ratio of a round is of neighbours, and the table has the median of them.
Both must have done the same work (samples, tokens, trained tokens), or the comparison is refused, as
it is on a machine that is busy with something else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))
from record import record  # noqa: E402

SAME = ("samples", "tokens", "trained_tokens", "threads")
TARGET = {"bf16": 1.5, "fp32": 1.15}
OVER_KERNELS = 1.35
# What each of RealFlow's compute types meets: TRL's own choices for it (the fastest counts).
RIVALS = {"bf16": ("bf16", "bf16-autocast"), "fp32": ("fp32",)}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of the checkpoint")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--compute", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--trl-batch", type=int, default=16, help="TRL's micro-batch in samples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-load", type=float, default=0.5, help="load of others that is borne")
    return parser.parse_args()


def wait_until_quiet(limit: float, patience: float = 300.0) -> float:
    """The load that is left when it falls below `limit`; ends the program if it never does.

    Only at the start: later rounds follow work of our own.
    """
    until = time.monotonic() + patience
    while (load := os.getloadavg()[0]) > limit:
        if time.monotonic() > until:
            raise SystemExit(f"the machine is busy (load {load:.1f}, at most {limit}): no fair measurement")
        time.sleep(5)
    return load


def side(python: Path | str, script: str, args: argparse.Namespace, *extra: str) -> dict[str, Any]:
    """Run one side; its result is its last line."""
    command = [str(python), str(HERE / script), "--model", args.model, *extra]
    for name in ("prompts", "samples", "new_tokens", "steps", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    load = os.getloadavg()[0]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{script} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    result["load_before"] = round(load, 2)  # of our own last process, or of somebody else
    print(f"  {script:17} {' '.join(extra):36} {result['seconds']:8.2f} s a step", flush=True)
    return result


def refuse_other_work(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """End the program unless both sides did the same work."""
    differing = {name: (ours[name], theirs[name]) for name in SAME if ours[name] != theirs[name]}
    if differing:
        raise SystemExit(f"the two sides did different work (RealFlow, TRL): {differing}")


def measure(compute: str, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one compute type."""
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        print(f"{compute}, round {number + 1} of {args.rounds}", flush=True)
        ours = side(sys.executable, "realflow_side.py", args, "--compute", compute)
        rivals = {
            name: side(
                args.trl_python, "trl_side.py", args, "--compute", name, "--batch", str(args.trl_batch)
            )
            for name in RIVALS[compute]
        }
        fastest = min(rivals.values(), key=lambda result: float(result["seconds"]))
        refuse_other_work(ours, fastest)
        rounds.append({"realflow": ours, "trl": fastest, "all_trl": rivals})
    times_faster = [entry["trl"]["seconds"] / entry["realflow"]["seconds"] for entry in rounds]
    return {
        "realflow_seconds": statistics.median(entry["realflow"]["seconds"] for entry in rounds),
        "trl_seconds": statistics.median(entry["trl"]["seconds"] for entry in rounds),
        "trl_compute": sorted({entry["trl"]["compute"] for entry in rounds}),
        "times_faster": statistics.median(times_faster),
        "times_faster_each": [round(value, 3) for value in times_faster],
        "target": TARGET[compute],
        "over_kernels": statistics.median(entry["realflow"]["over_kernels"] for entry in rounds),
        "over_kernels_target": OVER_KERNELS,
        "rounds": rounds,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The result as a table for README.md."""
    lines = [
        "| compute | RealFlow s | TRL s | times faster (target) | over own kernels (target) |",
        "|---|---|---|---|---|",
    ]
    for compute, row in results.items():
        lines.append(
            f"| {compute} | {row['realflow_seconds']:.2f} | {row['trl_seconds']:.2f} "
            f"| {row['times_faster']:.2f} ({row['target']}) "
            f"| {row['over_kernels']:.2f} ({row['over_kernels_target']}) |"
        )
    return "\n".join(lines)


def main() -> int:
    """Exit code 1 where a target is missed."""
    args = arguments()
    if not args.trl_python.exists():
        raise SystemExit(f"{args.trl_python} is missing: run experiments/vs-trl/setup.sh")
    load = wait_until_quiet(args.max_load)
    results = {compute: measure(compute, args) for compute in args.compute}
    settings = {key: value for key, value in vars(args).items() if key not in ("model", "trl_python")}
    path = record(HERE / "results" / "step.json", {"load": load, "settings": settings, **results})
    print(f"\n{table(results)}\n\nstored in {path.relative_to(ROOT)}")
    met = all(
        row["times_faster"] >= row["target"] and row["over_kernels"] <= OVER_KERNELS
        for row in results.values()
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
