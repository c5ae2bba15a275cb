"""Supervised fine-tuning through mpirun: the loss falls, and the number of ranks changes no weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import execute, weights
from tiny import tiny_model

STEPS = 6

GRAPH = """\
name: tiny-sft
models:
  actor:
    path: {model}
    dtype: float64
    optimizer: {{name: adamw, lr: 5.0e-3, schedule: cosine, warmup_steps: 2}}
data:
  source: jsonl
  path: {data}
  fields: {{prompt: prompt, completion: answer}}
  tokenize: actor
  max_length: 64
  batch: 8 prompts
calls:
  train:
    model: actor
    op: train
    use: losses.sft
    minibatches: 2
steps: {steps}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of ranks -> the directory of the run."""
    folder = tmp_path_factory.mktemp("sft")
    model = tiny_model(folder / "model", dtype="float64", seed=3)
    rows = [
        {"prompt": f"{i}+{i % 7}" + "=" * (i % 4), "answer": "so " * (i % 5) + f"{i}."} for i in range(24)
    ]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    graph = folder / "sft.yaml"
    graph.write_text(GRAPH.format(model=model, data=data, steps=STEPS))
    return {devices: execute(graph, folder / f"on-{devices}", devices).run_dir for devices in (1, 2)}


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    return [row["actor/loss"] for row in rows]


def test_the_loss_falls(runs: dict[int, Path]) -> None:
    found = losses(runs[2])
    assert found[-1] < 0.7 * found[0]
    assert found == pytest.approx(losses(runs[1]), rel=1e-8)


def test_two_ranks_learn_what_one_learns(runs: dict[int, Path]) -> None:
    from safetensors.torch import load_file

    start = load_file(runs[1].parent / "model" / "model.safetensors")
    alone, together = (weights(runs[ranks], STEPS) for ranks in (1, 2))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        update, other = value - start[name], together[name] - start[name]
        assert torch.linalg.norm(other - update) <= 1e-8 * torch.linalg.norm(update), name
        assert torch.linalg.norm(update) > 1e-3
