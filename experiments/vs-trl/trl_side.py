"""Seconds of a GRPO step of TRL's GRPOTrainer. Runs in `.venv-trl` (see setup.sh).

Prints one JSON object as its last line: the seconds of each measured step (generation and the rest
apart), the tokens that a step drew and trained, and the settings. The settings are the fastest that
TRL offers on a CPU for the same work: no gradient checkpointing, no reference model (beta 0), one
pass over the data, so that old log probabilities are not recomputed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

# What TRL calls them: weights as loaded, and whether compute runs under autocast to bfloat16.
COMPUTE = {
    "bf16": {"dtype": "bfloat16", "bf16": True},
    "bf16-autocast": {"dtype": "float32", "bf16": True},
    "fp32": {"dtype": "float32", "bf16": False},
}


def arguments() -> argparse.Namespace:
    """Parse the command line (the same words as realflow_side.py)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--data", type=Path, default=Path(__file__).with_name("prompts.json"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--compute", choices=COMPUTE, default="bf16")
    parser.add_argument("--batch", type=int, default=0, help="samples of a micro-batch (0: all at once)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument(
        "--warmup",
        type=int,
        default=1,
        choices=range(1, 9),
        metavar="N",
        help="steps before the measured ones",
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


class Clock(TrainerCallback):
    """Seconds of each optimizer step, and of the generation inside it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.generation: list[float] = []
        self._begin = 0.0
        self._generating = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before the generation of the step's samples."""
        self._generating = 0.0
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the optimizer's step."""
        self.steps.append(time.perf_counter() - self._begin)
        self.generation.append(self._generating)

    def watch(self, model: torch.nn.Module) -> list[tuple[int, ...]]:
        """Time `model.generate` from now on; returns the list that the output shapes go to."""
        generate, shapes = model.generate, []

        def timed(*args: Any, **kwargs: Any) -> torch.Tensor:
            begin = time.perf_counter()
            output = generate(*args, **kwargs)
            self._generating += time.perf_counter() - begin
            shapes.append(tuple(output.shape))
            return output

        model.generate = timed
        return shapes


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Parity of the drawn ids: mixed in nearly every group, so that every group trains."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def make_trainer(args: argparse.Namespace, clock: Clock, scratch: str) -> GRPOTrainer:
    """A trainer of `warmup + steps` steps; every completion has exactly `new_tokens` tokens."""
    samples = args.prompts * args.samples
    batch = args.batch or samples
    if samples % batch:
        raise SystemExit(f"--batch {batch} does not divide {samples} samples")
    questions = json.loads(args.data.read_text(encoding="utf-8"))
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in questions]
    compute = COMPUTE[args.compute]
    config = GRPOConfig(
        output_dir=scratch,
        use_cpu=True,
        bf16=bool(compute["bf16"]),
        model_init_kwargs={"dtype": compute["dtype"]},
        gradient_checkpointing=False,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=samples // batch,
        num_generations=args.samples,
        max_completion_length=args.new_tokens,
        generation_kwargs={"min_new_tokens": args.new_tokens},
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        loss_type="dapo",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_steps=args.warmup + args.steps,
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=1,
    )
    return GRPOTrainer(
        model=str(args.model),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[clock],
    )


def main() -> None:
    """Train, check that the work was the agreed one, print the result."""
    args = arguments()
    torch.set_num_threads(args.threads)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(args, clock, scratch)
        shapes = clock.watch(trainer.model)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    assert all(shape[0] == args.prompts * args.samples for shape in shapes), shapes
    assert all(entry["completions/mean_length"] == args.new_tokens for entry in log), log
    steps, generation = clock.steps[args.warmup :], clock.generation[args.warmup :]
    result = {
        "side": "trl",
        "seconds": statistics.median(steps),
        "generate_seconds": statistics.median(generation),
        "steps": [round(value, 4) for value in steps],
        "samples": args.prompts * args.samples,
        "trained_tokens": args.prompts * args.samples * args.new_tokens,
        "tokens": int(log[-1]["num_tokens"] - log[-2]["num_tokens"]),  # prompts and completions, no padding
        "zero_advantage_groups": [entry.get("frac_reward_zero_std") for entry in log[args.warmup :]],
        "grad_norm": [entry.get("grad_norm") for entry in log[args.warmup :]],
        "compute": args.compute,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
