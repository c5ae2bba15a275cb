"""The graph that makes a reward model (experiments/ppo): checked, and at tiny size from labels to scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from realflow.api import plan, run
from realflow.graph import Graph, load_graph

GRAPH = Path(__file__).resolve().parents[2] / "experiments" / "ppo" / "judge.yaml"


def labelled(folder: Path, count: int = 240) -> Path:
    """Answers that are right where they are a digit below 5, whatever the question."""
    rows = [
        {"prompt": f"{i // 10 % 10}?", "completion": str(i % 10), "rewards": float(i % 10 < 5)}
        for i in range(count)
    ]
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge(folder: Path, *overrides: str) -> Graph:
    samples = labelled(folder)
    model = tiny_model(folder / "model", seed=2)
    return load_graph(GRAPH, [f"samples={samples}", f"model={model}", *overrides])


def test_its_graph_is_right(tmp_path: Path) -> None:
    graph = judge(tmp_path)
    train = graph.call("train")
    assert graph.models["judge"].head == "value" and train.decl.needs == ("values",)
    assert train.reads["right"] == "right" and graph.extents["right"] == "prompt"
    assert train.options["normalise"] == "sequence"


@pytest.mark.full
def test_a_judge_learns_and_is_a_reward_model(tmp_path: Path) -> None:
    """From labelled answers to a sequence classifier that scores right ones above wrong ones."""
    result = run(
        plan(judge(tmp_path, "steps=40", "lr=3e-3"), devices=1, layouts="d1"),
        run_dir=tmp_path / "run",
        quiet=True,
    )
    accuracy = [step["judge/accuracy"] for step in result.metrics]
    assert sum(accuracy[-5:]) / 5 > 0.9 > sum(accuracy[:5]) / 5
    folder = result.run_dir / "checkpoints" / "step-000040" / "judge"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right, wrong = ([score(model, tokenizer, "4?", str(n)) for n in range(k, k + 5)] for k in (0, 5))
    assert min(right) > max(wrong) + 1


@torch.no_grad()
def score(model: torch.nn.Module, tokenizer: object, prompt: str, answer: str) -> float:
    """The number at the last token, the end of the answer."""
    text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    tokens = tokenizer(f"{text}{answer}<|im_end|>", add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return float(model(input_ids=torch.tensor([tokens])).logits[0, 0])
