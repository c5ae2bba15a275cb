"""Small real runs: a tiny model, real mpirun, real sockets, real files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from tiny import tiny_model

from realflow.api import plan, run
from realflow.graph import load_graph
from realflow.launch.local import RunResult

GRAPH = """\
name: tiny
params: {{dtype: float64, lr: 1e-2, steps: 3, samples: 4, minibatches: 2, temperature: 1.0}}
models:
  actor:
    path: {model}
    dtype: ${{dtype}}
    optimizer: {{name: adamw, lr: "${{lr}}"}}
  ref:
    path: {model}
    dtype: ${{dtype}}
data:
  source: jsonl
  path: {data}
  fields: {{prompt: prompt, answer: answer}}
calls:
  rollout:
    model: actor
    op: generate
    batch: 6 prompts
    samples: ${{samples}}
    max_new_tokens: 8
    temperature: ${{temperature}}
  reward:
    op: function
    use: "{reward}"
    timeout: {timeout}
  ref:
    model: ref
    op: infer
    use: logprobs
    writes: {{logprobs: ref_logprobs}}
  credit:
    op: function
    use: advantages.grpo
  train:
    model: actor
    op: train
    use: losses.ppo_clip
    minibatches: ${{minibatches}}
    options: {{kl_coef: 0.05}}
steps: ${{steps}}
checkpoint: {{every: 2 steps}}
"""

OPTIONS = "    options: {kl_coef: 0.05}\n"

REWARDS = """\
import os
import pathlib
import re
import signal
import time

from realflow.algorithms.losses import ppo_clip
from realflow.graph.functions import loss

READS = {"old_logprobs": "token float field=logprobs", "advantages": "token float"}

@loss(reads=READS, needs=("logprobs", "entropy"))
def slow_loss(logprobs, entropy, old_logprobs, advantages, mask):
    (pathlib.Path(__file__).parent / "training.txt").touch()
    time.sleep(3)
    return ppo_clip(
        logprobs=logprobs, mask=mask, old_logprobs=old_logprobs, advantages=advantages
    )

@loss(reads=READS, needs=("logprobs", "entropy"))
def deadly_loss(logprobs, entropy, old_logprobs, advantages):
    os.kill(os.getpid(), signal.SIGKILL)

def letters(completions, answer, **columns):
    return [sum(c.isalpha() for c in text) / 8 + 0.01 * len(a) for text, a in zip(completions, answer)]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(c.isdigit() for c in solution_str) / 8

def raises(completions, **columns):
    raise KeyError("no such column")

def hangs(data_source, solution_str, ground_truth, extra_info=None):
    time.sleep(1000)

def hangs_on_columns(completions, **columns):
    time.sleep(1000)

def not_a_number(completions, **columns):
    return [float("nan") if i == 1 else 0.5 for i, _ in enumerate(completions)]

def too_few(completions, **columns):
    return [1.0]

def fails_once(completions, **columns):
    folder = pathlib.Path(__file__).parent
    seen = folder / "seen.txt"
    before = int(seen.read_text()) if seen.exists() else 0
    seen.write_text(str(before + len(completions)))
    if before > 60 and not (folder / "failed.txt").exists():
        (folder / "failed.txt").touch()
        raise RuntimeError("only this once")
    return letters(completions, ["1"] * len(completions))

def spins(completions, **columns):
    return [float(bool(re.match("(a+)+$", "a" * 64 + "b"))) for _ in completions]

def slow(completions, **columns):
    time.sleep(0.5)
    return [0.0 for _ in completions]
"""


def write_graph(
    folder: Path,
    *,
    reward: str = "my_rewards:letters",
    timeout: float = 60,
    loss: str = "losses.ppo_clip",
    follows: str = "",
) -> Path:
    """A graph file with its data, rewards and model beside it."""
    model = tiny_model(folder / "model", dtype="float64", seed=3)
    rows = [{"prompt": f"{'ab' * (i % 5)}{i}+{i % 3}=", "answer": str(i) * (1 + i % 3)} for i in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARDS)
    path = folder / "tiny.yaml"
    text = GRAPH.format(model=model, data=folder / "prompts.jsonl", reward=reward, timeout=timeout)
    if loss != "losses.ppo_clip":
        text = text.replace("    use: losses.ppo_clip", f"    use: {loss}").replace(OPTIONS, "")
    if follows:
        text = text.replace("  ref:\n    path", f"  ref:\n    follows: {follows}\n    path")
    path.write_text(text)
    return path


def execute(
    graph: Path, run_dir: Path, devices: int, overrides: tuple[str, ...] = (), **layouts: str
) -> RunResult:
    """Plan and run; `layouts` names calls."""
    made = plan(load_graph(graph, overrides), devices=devices, layouts=layouts or f"d{devices}")
    return run(made, run_dir=run_dir, quiet=True)


def samples(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Sample id -> its record."""
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert len({row["sample_id"] for row in rows}) == len(rows)
    return {row["sample_id"]: row for row in rows}


def weights(run_dir: Path, step: int = 3, model: str = "actor") -> dict[str, torch.Tensor]:
    """The weights of a model in a checkpoint, whatever files they are in."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}" / model
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not found.keys() & part.keys()
        found |= part
    return found


def close(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """Assert that two models went the same way from `start` (1e-8); returns the largest step of a weight."""
    assert ours.keys() == theirs.keys() == start.keys()
    moved = 0.0
    for name, value in theirs.items():
        update, other = (w.double() - start[name].double() for w in (value, ours[name]))
        assert torch.linalg.norm(other - update) <= 1e-8 * torch.linalg.norm(update), name
        moved = max(moved, float(update.abs().max()))
    return moved


@contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that a test started, with all that it started: gone when the test ends, however it does."""
    try:
        yield process
    finally:
        if process.poll() is None:
            everyone = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
            for left in psutil.wait_procs(everyone, timeout=1)[1]:
                left.kill()
