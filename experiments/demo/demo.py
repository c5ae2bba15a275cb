"""`make demo`: a small real model learns one-digit sums by GRPO, and shows what it learned.

    python experiments/demo/demo.py                      # about 7 minutes on 2 cores
    python experiments/demo/demo.py --steps 2 --seed 3 lr=2e-5

It runs the commands that people use every day (`realflow profile` where this machine has none yet, `plan`,
`run`, `report`), then loads the model before and after with Hugging Face code alone and asks both three
held-out questions.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner import local_cluster
from realflow.api import new_run_dir, read_plan
from realflow.errors import InputError
from realflow.observe.metrics import read_metrics
from realflow.planfile import Plan
from realflow.profiling.store import stored

_SHOWN = 3
_PROFILE_SECONDS = 45
_FEW = 5


def main(arguments: list[str] | None = None) -> int:
    """Plan, run, report and show; returns the exit code (that of the first command that failed)."""
    args = _parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        run_dir = new_run_dir("demo", name=args.name)
        plan_file = run_dir.with_name(f"{run_dir.name}.plan.yaml")
        plan_file.parent.mkdir(parents=True, exist_ok=True)
        settings = [f"steps={args.steps}", f"seed={args.seed}", *args.overrides]
        commands = (
            *_measured(settings, args.devices),
            ("plan", "grpo", *settings, "--devices", str(args.devices), "-o", str(plan_file)),
            ("run", str(plan_file), "--run-dir", str(run_dir)),
            ("report", str(run_dir)),
        )
        for command in commands:
            code = _realflow(console, *command)
            if code != 0:
                return code
        _show(console, run_dir, read_plan(run_dir / "plan.yaml"))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _measured(settings: list[str], devices: int) -> list[tuple[str, ...]]:
    """The command that measures this machine for the planner where nobody has: shortly, for this model."""
    if stored(local_cluster(devices).nodes[0].kind) is not None:
        return []
    return [("profile", "grpo", *settings, "--devices", str(devices), "--seconds", str(_PROFILE_SECONDS))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a small real model on one-digit sums and show what it learned."
    )
    parser.add_argument("--steps", type=int, default=45, help="training steps (default: 45)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the run (default: 1)")
    parser.add_argument("--devices", type=int, default=2, help="workers (default: 2)")
    parser.add_argument("--name", help="the run's directory is runs/NAME (default: demo, demo-2, ...)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="params of graphs/grpo.yaml")
    return parser


def _realflow(console: Console, *arguments: str) -> int:
    """Run one command as a user would, on this terminal."""
    console.print(Text(f"$ realflow {shlex.join(arguments)}", style="bold"))
    return subprocess.run([sys.executable, "-m", "realflow", *arguments], check=False).returncode


def _show(console: Console, run_dir: Path, plan: Plan) -> None:
    """Three held-out questions before and after, the reward at both ends, and where things are."""
    # Loading transformers takes seconds: only when the run is done.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from answers import checkpoints, generate, held_out

    questions = held_out(plan)[:_SHOWN]
    models = checkpoints(run_dir, plan)
    rollout = next(call for call in plan.graph.calls if call.op == "generate")
    limit = rollout.sampling.max_new_tokens if rollout.sampling else 16
    before, after = (
        [texts[0] for texts in generate(folder, questions, chat=rollout.chat, max_new_tokens=limit)]
        for folder in (models.before, models.after)
    )
    table = Table("held-out question", "answer", "before", "after", title="Greedy answers", show_lines=True)
    for question, old, new in zip(questions, before, after, strict=True):
        table.add_row(*(Text(text.strip()) for text in (question.prompt, question.answer, old, new)))
    Console(highlight=False).print(table)
    console.print(reward_line(run_dir))
    console.print(f"run         {run_dir}")
    console.print(f"checkpoint  {models.after}")
    console.print(f"report      {run_dir / 'report.html'}")


def reward_line(run_dir: Path) -> str:
    """Mean reward over the first and the last five steps (of a short run: over its halves)."""
    rewards = [row.get("critic/rewards/mean") for row in read_metrics(run_dir)]
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2:
        return f"reward      {len(known)} steps have one: nothing to compare"
    few = min(_FEW, len(known) // 2)
    first, last = statistics.fmean(known[:few]), statistics.fmean(known[-few:])
    change = f"{last - first:+.3f}"
    return f"reward      {first:.3f} at the start, {last:.3f} at the end ({change}; mean of {few})"


if __name__ == "__main__":
    sys.exit(main())
