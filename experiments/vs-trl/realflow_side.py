"""Seconds of a GRPO step of RealFlow's engines in one process: the work of trl_side.py.

Prints one JSON object as its last line: the seconds of each measured step, of generation apart, and
of the step's own kernels (forward, backward, optimizer, decode), each measured alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from realflow.algorithms.advantages import grpo
from realflow.algorithms.losses import ppo_clip
from realflow.data.balance import micro_batches
from realflow.data.batch import Batch, pack
from realflow.data.text import encode_prompt
from realflow.engines.generate import Finished, NativeEngine, Prompt
from realflow.engines.infer import prepare, scored_tokens, scores
from realflow.engines.optimizer import FlatAdamW
from realflow.engines.train import TrainEngine
from realflow.graph.types import Dtype, Extent, OptimizerSpec, Sampling
from realflow.models.causal import load_model

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
OPTIMIZER = OptimizerSpec(lr=1e-6, clip_norm=1.0)
EXTENTS: dict[str, Extent] = {
    "tokens": "token",
    "logprobs": "token",
    "loss_mask": "token",
    "advantages": "sample",
}
FIELDS: dict[str, Dtype] = {"tokens": "int", "logprobs": "float", "loss_mask": "bool", "advantages": "float"}


def arguments() -> argparse.Namespace:
    """Parse the command line (the same words as trl_side.py)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--data", type=Path, default=Path(__file__).with_name("prompts.json"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--compute", choices=DTYPES, default="bf16")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the measured ones")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


@dataclass
class Step:
    """What one step took and did."""

    seconds: float
    generate: float
    decode: float
    batches: list[Batch]
    stats: dict[str, float]


class Loop:
    """Generation and training over one model's weights, as a worker does both."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model = load_model(args.model, dtype=DTYPES[args.compute])
        self.train = TrainEngine(self.model, OPTIMIZER)
        self.rollout = NativeEngine(
            self.model,
            Sampling(max_new_tokens=args.new_tokens),
            slots=args.prompts * args.samples,
            max_length=512,
            seed=1,
            eos_ids=(),  # every sample has exactly new_tokens tokens, as on the other side
            tokenizer=self.tokenizer,
        )
        self.decode_seconds = 0.0
        self.rollout._decoder = self._timed(self.rollout._decoder)
        self.questions = json.loads(args.data.read_text(encoding="utf-8"))

    def step(self, number: int) -> Step:
        """Draw, reward, train: one step on the next prompts."""
        self.decode_seconds = 0.0
        begin = time.perf_counter()
        samples = self.generate(number)
        generated = time.perf_counter()
        batches = self.batches(samples)
        stats = self.train.step(
            batches, ppo_clip, reads={"old_logprobs": "logprobs", "advantages": "advantages"}
        )
        self.rollout.set_version(self.train.version)
        end = time.perf_counter()
        return Step(end - begin, generated - begin, self.decode_seconds, batches, stats)

    def generate(self, number: int) -> list[Finished]:
        """All samples of the step, in order of their ids."""
        prompts, samples = self.args.prompts, self.args.samples
        for group in range(number * prompts, (number + 1) * prompts):
            question = self.questions[group % len(self.questions)]
            tokens = tuple(encode_prompt(self.tokenizer, question, chat=True))
            ids = tuple(range(group * samples, (group + 1) * samples))
            self.rollout.feed([Prompt(group, ids, tokens)])
        finished: list[Finished] = []
        while self.rollout.busy:
            finished += self.rollout.step()
        return sorted(finished, key=lambda sample: sample.sample_id)

    def batches(self, samples: list[Finished]) -> list[Batch]:
        """Rewards (the parity of the drawn ids), advantages, packed micro-batches."""
        rewards = [float(int(sample.tokens[sample.loss_mask].sum()) % 2) for sample in samples]
        groups = torch.tensor([sample.group_id for sample in samples])
        advantages = grpo(torch.tensor(rewards, dtype=torch.float64), groups).tolist()
        lengths = [len(sample.tokens) for sample in samples]
        columns: dict[str, list[Any]] = {
            name: [getattr(sample, name) for sample in samples]
            for name in ("tokens", "logprobs", "loss_mask")
        }
        columns["advantages"] = advantages
        return [
            pack(
                [samples[i].sample_id for i in part],
                [lengths[i] for i in part],
                {name: [column[i] for i in part] for name, column in columns.items()},
                EXTENTS,
                FIELDS,
            )
            for part in micro_batches(lengths, self.args.micro_batch_tokens)
        ]

    def _timed(self, decoder: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            output = decoder(*args)
            self.decode_seconds += time.perf_counter() - begin
            return output

        return call


def median_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds of `work`, after one call that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def kernels(args: argparse.Namespace, batches: list[Batch]) -> dict[str, float]:
    """Forward with backward, and the optimizer, alone: no hooks, no packing, no bookkeeping.

    A model of its own, so that the gradient hooks of the training engine are not in the way.
    """
    model = load_model(args.model, dtype=DTYPES[args.compute])
    parameters = [parameter.requires_grad_(True) for parameter in model.module.parameters()]

    def forward_backward() -> None:
        for batch in batches:
            states = model.run(prepare(model, batch))
            scores(model, states, batch, scored_tokens(batch), 1.0).logprobs.sum().backward()
        for parameter in parameters:
            parameter.grad = None

    shard = torch.zeros(len(model.flat.storage), dtype=torch.float32)
    optimizer, gradient = FlatAdamW([shard], OPTIMIZER), torch.ones_like(shard)
    return {
        "forward_backward": median_seconds(forward_backward),
        "optimizer": median_seconds(lambda: optimizer.step([gradient], OPTIMIZER.lr)),
    }


def main() -> None:
    """Train, check that the work was the agreed one, print the result."""
    args = arguments()
    torch.set_num_threads(args.threads)
    loop = Loop(args)
    steps = [loop.step(number) for number in range(args.warmup + args.steps)][args.warmup :]
    samples = args.prompts * args.samples
    batches = steps[-1].batches
    trained = sum(int(batch.fields["loss_mask"].sum()) for batch in batches)
    assert trained == samples * args.new_tokens, (trained, samples, args.new_tokens)
    alone = {"decode": statistics.median(step.decode for step in steps), **kernels(args, batches)}
    seconds = statistics.median(step.seconds for step in steps)
    result = {
        "side": "realflow",
        "seconds": seconds,
        "generate_seconds": statistics.median(step.generate for step in steps),
        "steps": [round(step.seconds, 4) for step in steps],
        "samples": samples,
        "trained_tokens": trained,
        "tokens": sum(int(batch.lengths.sum()) for batch in batches),
        "kernels": {name: round(value, 4) for name, value in alone.items()},
        "over_kernels": seconds / sum(alone.values()),
        "grad_norm": [step.stats["actor/grad_norm"] for step in steps],
        "compute": args.compute,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
