"""Every algorithm on the same task: does it learn, from three seeds?

    python experiments/algorithms/study.py run                          # all of them, three seeds: two hours
    python experiments/algorithms/study.py run --only grpo rloo --seeds 1
    python experiments/algorithms/study.py show                         # the table, and the plot

The graphs are the shipped ones, with two things said beside them: an evaluation on held-out questions every
five steps, and for `ppo` answers that are checked (as its own comment says) and not judged by a model, so
that all have the same reward. The start is the evaluation of a run that learns nothing. Results are stored
when a run ends (results/<algorithm>-<seed>.json), and what is stored is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]  # the first: experiments/planner is no package

from record import record  # noqa: E402

from realflow.api import plan, run  # noqa: E402
from realflow.graph import find_graph  # noqa: E402

RESULTS = HERE / "results"
RUNS = Path("runs") / "algorithms"
ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {},
    "dr_grpo": {},
    "rloo": {},
    "reinforce_pp": {},
    "dapo": {},
    "gspo": {},
    "ppo": {},
}
"""Name of the graph -> params that are not the shipped ones."""
START = "start"
"""The name of the run that learns nothing: `grpo` with next to no learning rate, for one step."""
GAIN = 0.2
"""By which each is to end above its start."""
EVERY, QUESTIONS, ANSWERS = 5, 50, 4


def main() -> int:
    """Run or show; returns the exit code."""
    parser = argparse.ArgumentParser(description="Every algorithm on the same task.")
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=30, help="training steps (default: 30)")
    parser.add_argument("--devices", type=int, default=2, help="ranks, data parallel (default: 2)")
    args = parser.parse_args()
    return measure(args) if args.what == "run" else show(args.only, args.seeds)


def measure(args: argparse.Namespace) -> int:
    """Run what is not stored yet, one seed of all before the next."""
    for seed in args.seeds:
        for name in (START, *args.only):
            path = RESULTS / f"{name}-{seed}.json"
            if path.exists():
                print(f"{name}, seed {seed}: stored already")
                continue
            steps = 1 if name == START else args.steps
            found = _run(name, seed, steps, args.devices)
            record(path, {"algorithm": name, "seed": seed, "steps": steps, **found})
            print(
                f"{name}, seed {seed}: {found['evaluations'][-1][1]:.3f} of the held-out answers", flush=True
            )
    return 0


def _run(name: str, seed: int, steps: int, devices: int) -> dict[str, Any]:
    """One run: (step, share of held-out answers that are right) of each evaluation, and training rewards."""
    graph = "grpo" if name == START else name
    params = {"seed": seed, "steps": steps, **ALGORITHMS.get(name, {})}
    if name == START:
        params["lr"] = 1e-12
    folder = RUNS / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(with_evaluation(graph), sort_keys=False), encoding="utf-8")
    overrides = [f"{key}={value}" for key, value in params.items()]
    made = plan(str(file), devices=devices, layouts={"*": f"d{devices}"}, overrides=overrides)
    rows = run(made, run_dir=folder, quiet=True).metrics
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {
        "evaluations": [(row["step"] + 1, row["eval/pass@1"]) for row in rows if "eval/pass@1" in row],
        "rewards": [row["critic/rewards/mean"] for row in rows],
        "seconds": statistics.median(row["timing_s/step"] for row in rows),
    }


def with_evaluation(name: str) -> dict[str, Any]:
    """A shipped graph with an evaluation on held-out questions, its answers checked by a function."""
    graph: dict[str, Any] = yaml.safe_load(Path(find_graph(name)).read_text(encoding="utf-8"))
    if name == "ppo":
        del graph["models"]["reward"]
        graph["models"]["critic"]["path"] = "${model}"
        graph["calls"]["reward"] = {"op": "function", "use": "rewards.last_number"}
        del graph["params"]["reward_model"]
    data = copy.deepcopy(graph["data"])  # the same object twice would be written as an anchor
    data |= {"split": {**data["split"], "use": "test"}, "batch": f"{QUESTIONS} prompts"}
    graph["evaluate"] = {
        "every": f"{EVERY} steps",
        "data": data,
        "samples": ANSWERS,
        "reward": {"use": "rewards.last_number"},
    }
    return graph


def show(names: Sequence[str], seeds: Sequence[int]) -> int:
    """Print the table, draw the plot, and store both; exit code 1 where one did not learn enough."""
    stored = {
        (name, seed): json.loads(path.read_text(encoding="utf-8"))["results"]
        for name in (START, *names)
        for seed in seeds
        if (path := RESULTS / f"{name}-{seed}.json").exists()
    }
    table = Table("algorithm", *(f"seed {seed}" for seed in seeds), "mean gain", f"above {GAIN}")
    summary = {}
    for name in names:
        gains = [
            stored[name, seed]["evaluations"][-1][1] - stored[START, seed]["evaluations"][-1][1]
            for seed in seeds
            if (name, seed) in stored and (START, seed) in stored
        ]
        if not gains:
            continue
        cells = []
        for seed in seeds:
            if (name, seed) in stored and (START, seed) in stored:
                start = stored[START, seed]["evaluations"][-1][1]
                cells.append(f"{start:.3f} to {stored[name, seed]['evaluations'][-1][1]:.3f}")
            else:
                cells.append("-")
        enough = min(gains) >= GAIN
        summary[name] = {"gains": gains, "enough": enough}
        table.add_row(name, *cells, f"{statistics.fmean(gains):+.3f}", "yes" if enough else "no")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if not summary:
        print(f"nothing is stored in {RESULTS}: `run` first", file=sys.stderr)
        return 2
    record(RESULTS / "algorithms.json", summary)
    _draw(stored, names, seeds)
    complete = all(len(row["gains"]) == len(seeds) for row in summary.values()) and len(summary) == len(names)
    return 0 if complete and all(row["enough"] for row in summary.values()) else 1


def _draw(
    stored: Mapping[tuple[str, int], Mapping[str, Any]], names: Sequence[str], seeds: Sequence[int]
) -> None:
    """The held-out share over the steps: the mean of the seeds, and the span between them."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name in names:
        lines = []
        for seed in seeds:
            if (name, seed) in stored and (START, seed) in stored:
                first = (0, stored[START, seed]["evaluations"][-1][1])
                lines.append([first, *map(tuple, stored[name, seed]["evaluations"])])
        if not lines:
            continue
        steps = [step for step, _ in lines[0]]
        columns = list(zip(*([value for _, value in line] for line in lines), strict=True))
        axes.plot(steps, [statistics.fmean(column) for column in columns], label=name)
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15)
    axes.set(xlabel="step", ylabel="held-out answers that are right", ylim=(0, 1))
    axes.legend()
    figure.savefig(RESULTS / "algorithms.svg")


if __name__ == "__main__":
    sys.exit(main())
