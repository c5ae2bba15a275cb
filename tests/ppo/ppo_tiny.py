"""graphs/ppo.yaml at tiny size: models, data, small real runs of it, and what its reference must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from realflow.api import plan, run
from realflow.graph import Graph, find_graph, graph_to_mapping, load_graph

STEPS = 5
RATE = 0.1
MOVING = (f"ref_rate={RATE}", "kl_target=0.01", "kl_horizon=100")
"""All that can move beside the weights: the reference follows, and the coefficient of the KL adapts."""


def tiny_scorer(directory: Path, dtype: str = "float64", seed: int = 0) -> Path:
    """A random reward model: a sequence classifier with one label, whose scores differ widely."""
    generator = torch.Generator().manual_seed(seed)
    config = tiny_config("llama", num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else 1 + noise * 0.1)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def ppo_graph(folder: Path, *overrides: str, optimizer: Mapping[str, Any] | None = None) -> Graph:
    """The shipped graph with tiny models and prompts of its own; `optimizer` changes both optimizers."""
    actor, scorer = folder / "actor", folder / "scorer"
    if not actor.exists():
        tiny_model(actor, dtype="float64", seed=3)
        tiny_scorer(scorer, seed=4)
        rows = [{"question": f"{'ab' * (i % 5)}{i}+{i % 3}=", "answer": str(i)} for i in range(24)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": actor, "reward_model": scorer, "dtype": "float64", "prompts": 6, "samples": 2,
        "lr": 1e-2, "critic_lr": 1e-2, "kl_coef": 0.1, "max_new_tokens": 8, "steps": STEPS,
    } | dict(override.split("=", 1) for override in overrides)  # fmt: skip
    graph = load_graph(find_graph("ppo"), [f"{k}={v}" for k, v in settings.items()])
    mapping = graph_to_mapping(graph)
    mapping["data"] = {
        "source": "jsonl",
        "path": str(folder / "prompts.jsonl"),
        "fields": {"prompt": "question", "answer": "answer"},
    }
    mapping["checkpoint"] = {"every": "1 steps", "keep": STEPS}
    for model in ("actor", "critic"):
        mapping["models"][model]["optimizer"] |= optimizer or {}
    return load_graph(mapping)


def execute(graph: Graph, run_dir: Path, devices: int, **layouts: str) -> Path:
    """Plan and run; `layouts` names calls."""
    run(plan(graph, devices=devices, layouts=layouts or f"d{devices}"), run_dir=run_dir, quiet=True)
    return run_dir


def samples(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Sample id -> its record."""
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return {row["sample_id"]: row for row in rows}


def weights(run_dir: Path, model: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted((run_dir / "checkpoints" / f"step-{step:06d}" / model).glob("*.safetensors")):
        found |= load_file(file)
    return found


def average(folder: Path, run_dir: Path, rate: float, step: int = STEPS) -> dict[str, torch.Tensor]:
    """What the reference must be after `step` steps, from the actor's checkpoints alone, in float64."""
    found = {k: v.double() for k, v in load_file(folder / "actor" / "model.safetensors").items()}
    for done in range(1, step + 1):
        actor = weights(run_dir, "actor", done)
        found = {name: (1 - rate) * value + rate * actor[name].double() for name, value in found.items()}
    return found


def follows(folder: Path, run_dir: Path, rate: float = RATE, step: int = STEPS) -> float:
    """How far the reference is from that, relative to how far it went: the largest of any tensor."""
    start = load_file(folder / "actor" / "model.safetensors")
    ref, wanted = weights(run_dir, "ref", step), average(folder, run_dir, rate, step)
    assert ref.keys() == wanted.keys() == start.keys()
    return max(
        float(torch.linalg.norm(ref[name].double() - value) / torch.linalg.norm(ref[name] - start[name]))
        for name, value in wanted.items()
    )
