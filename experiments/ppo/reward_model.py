"""Make the reward model that graphs/ppo.yaml starts from, and put it in the cache of models.

    python experiments/ppo/reward_model.py                       # samples of a run of its own
    python experiments/ppo/reward_model.py runs/demo/samples.jsonl

SmolLM2-135M-Instruct learns from answers that were checked (those of a GRPO run) which are right.
With no more steps than there are answers for, each answer is measured before it is learned from.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from realflow.api import new_run_dir, plan, run
from realflow.errors import RealFlowError
from realflow.graph import load_graph
from realflow.models.paths import is_model, models_dir

NAME = "smollm2-135m-sums-reward"
GRAPH = Path(__file__).with_name("judge.yaml")


def main(arguments: list[str] | None = None) -> int:
    """Sample, train, and put into the cache; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the reward model of graphs/ppo.yaml.")
    parser.add_argument("samples", nargs="?", type=Path, help="samples.jsonl of a run with checked answers")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="steps of training, of 32 answers each")
    parser.add_argument("--sampling-steps", type=int, default=20, help="of GRPO, of 64 answers each")
    args = parser.parse_args(arguments)
    target = models_dir() / NAME
    if is_model(target):
        print(f"{NAME} is in the cache: {target}")
        return 0
    try:
        samples = args.samples or _sampled(args.devices, args.sampling_steps)
        overrides = [f"samples={samples.resolve()}", f"steps={args.steps}"]
        result = run(plan(load_graph(GRAPH, overrides), devices=args.devices), run_dir=new_run_dir("judge"))
    except RealFlowError as error:
        print(error, file=sys.stderr)
        return 2
    last = [step["judge/accuracy"] for step in result.metrics[-10:]]
    print(f"accuracy of the last {len(last)} steps, before learning: {statistics.fmean(last):.3f}")
    made = result.run_dir / "checkpoints" / f"step-{args.steps:06d}" / "judge"
    beside = target.with_name(f".{NAME}.tmp")
    shutil.copytree(made, beside, dirs_exist_ok=True)
    beside.rename(target)
    print(f"{NAME} is ready: {target}")
    return 0


def _sampled(devices: int, steps: int) -> Path:
    """Answers of the graph `grpo`, checked by its reward."""
    return run("grpo", overrides=[f"steps={steps}"], devices=devices).run_dir / "samples.jsonl"


if __name__ == "__main__":
    sys.exit(main())
