"""Held-out accuracy before and after training, by plain Hugging Face code.

    python experiments/demo/evaluate.py runs/demo

Every question of the test split gets 16 samples at temperature 1 from the start model and from the
last checkpoint, with the same seeds. The 95 % interval of the difference is a bootstrap over
questions, paired: a question keeps its two accuracies together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from record import record

from realflow.errors import InputError
from realflow.planfile import Plan, read_plan
from realflow.rewards.builtin import last_number

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Evaluate, print and store; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        plan = read_plan(args.run_dir / "plan.yaml")
        table = evaluate(args.run_dir, plan, samples=args.samples, seed=args.seed, limit=args.questions)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    low, high = table["difference_95"]
    print(f"questions   {table['questions']} held out, {args.samples} samples each, temperature 1")
    print(f"before      {table['before']:.3f}")
    print(f"after       {table['after']:.3f}")
    print(f"difference  {table['difference']:+.3f}   95 % interval {low:+.3f} to {high:+.3f}")
    path = record(args.output or HERE / "results" / f"held-out-{args.run_dir.resolve().name}.json", table)
    print(f"stored      {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Held-out accuracy of a demo run, before and after.")
    parser.add_argument("run_dir", type=Path, help="directory of a run, such as runs/demo")
    parser.add_argument("--samples", type=int, default=16, help="samples of each question (default: 16)")
    parser.add_argument("--questions", type=int, help="only the first N questions")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: results/ beside this)")
    return parser


def evaluate(run_dir: Path, plan: Plan, *, samples: int, seed: int, limit: int | None) -> dict[str, Any]:
    """Accuracies, their difference and its interval, with each question's numbers.

    Raises InputError where the run saved no checkpoint.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from answers import checkpoints, generate, held_out

    questions = held_out(plan)[:limit]
    models = checkpoints(run_dir, plan)
    rollout = next(call for call in plan.graph.calls if call.op == "generate")
    new_tokens = rollout.sampling.max_new_tokens if rollout.sampling else 16
    accuracy: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for name, folder in (("before", models.before), ("after", models.after)):
        began = time.perf_counter()
        answers = generate(
            folder,
            questions,
            samples=samples,
            temperature=1.0,
            max_new_tokens=new_tokens,
            chat=rollout.chat,
            seed=seed,
        )
        seconds[name] = round(time.perf_counter() - began, 1)
        accuracy[name] = [
            statistics.fmean(last_number(texts, [question.answer] * samples))
            for question, texts in zip(questions, answers, strict=True)
        ]
    low, high = paired_interval(accuracy["before"], accuracy["after"])
    before, after = (statistics.fmean(accuracy[name]) for name in ("before", "after"))
    return {
        "run": run_dir.resolve().name,
        "graph": {"name": plan.graph.name, "seed": plan.graph.seed, "steps": plan.graph.steps},
        "checkpoint": models.after.parent.name,
        "questions": len(questions),
        "samples": samples,
        "seed": seed,
        "before": before,
        "after": after,
        "difference": after - before,
        "difference_95": [low, high],
        "seconds": seconds,
        "by_question": [
            {"question": question.prompt, "before": old, "after": new}
            for question, old, new in zip(questions, accuracy["before"], accuracy["after"], strict=True)
        ],
    }


def paired_interval(
    before: Sequence[float], after: Sequence[float], *, draws: int = 20_000, seed: int = 0
) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of the mean difference over questions drawn with replacement.

    Efron's percentile bootstrap; each question's difference is one unit.
    """
    difference = np.asarray(after) - np.asarray(before)
    places = np.random.default_rng(seed).integers(0, len(difference), (draws, len(difference)))
    low, high = np.quantile(difference[places].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())
