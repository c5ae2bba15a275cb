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
    """Answers to `<digit>?`: the digit again (right) or another one (wrong)."""
    rows = []
    for i in range(count):
        right = i % 2
        rows.append(
            {
                "prompt": f"{i // 2 % 10}?",
                "completion": str((i // 2 + (0 if right else 1 + i // 20 % 9)) % 10),
                "rewards": float(right),
            }
        )
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
        plan(judge(tmp_path, "steps=60", "lr=1e-2"), devices=1), run_dir=tmp_path / "run", quiet=True
    )
    accuracy = [step["judge/accuracy"] for step in result.metrics]
    assert sum(accuracy[-5:]) / 5 > 0.9 > sum(accuracy[:5]) / 5
    folder = result.run_dir / "checkpoints" / "step-000060" / "judge"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = score(model, tokenizer, "4?", "4")
    wrong = [score(model, tokenizer, "4?", str(other)) for other in range(10) if other != 4]
    assert right > sum(wrong) / len(wrong) + 1


@torch.no_grad()
def score(model: torch.nn.Module, tokenizer: object, prompt: str, answer: str) -> float:
    """The number at the last token, the end of the answer."""
    text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    tokens = tokenizer(f"{text}{answer}<|im_end|>", add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return float(model(input_ids=torch.tensor([tokens])).logits[0, 0])
