"""`evaluate:` of a graph: read, checked, written back."""

from __future__ import annotations

from pathlib import Path

import pytest

from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph
from realflow.graph.evaluate import EVAL, SCORE, evaluated
from realflow.graph.types import Graph, Sampling
from realflow.graph.words import explain_batch

EVALUATE = """
evaluate:
  every: 20 steps
  data:
    source: reasoning_gym
    task: chain_sum
    options: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}
    size: 4000
    unique: question
    split: {test: 0.3, use: test}
    fields: {prompt: question, answer: answer}
    batch: 40 prompts
  samples: 4
  temperature: 0.6
  reward: {use: rewards.last_number}
  keep_best: true
"""
REWARDS = """\
from realflow.graph import function

def columns(completions, answer, level=None, **columns): ...

@function(reads={"said": "sample text field=completion", "truth": "sample any field=answer"},
          writes={"rewards": "sample float"})
def mine(said, truth, *, weight=1.0): ...

@function(reads={"logprobs": "token float", "loss_mask": "token bool"}, writes={"rewards": "sample float"},
          scope="batch", state={"n": 0})
def stateful(logprobs, loss_mask, *, state): ...
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "eval_rewards.py").write_text(REWARDS)
    return folder


def load(folder: Path, *changes: tuple[str, str], graph: str = "grpo") -> Graph:
    text = find_graph(graph).read_text() + EVALUATE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "graph.yaml").write_text(text)
    return load_graph(folder / "graph.yaml")


def test_what_a_graph_says_is_read_and_written_back(folder: Path) -> None:
    graph = load(folder)
    spec = graph.evaluate
    assert spec is not None and (spec.every, spec.keep_best) == (20, True)
    draws, scores = spec.graph.calls
    assert (spec.graph.prompts, spec.graph.samples, spec.graph.data.use) == (40, 4, "test")
    assert draws.name == EVAL and draws.model == "actor" and draws.sampling == Sampling(16, temperature=0.6)
    assert scores.name == SCORE
    assert scores.reads == {"completion": f"{EVAL}.completion", "answer": "answer"}
    rollout = evaluated(graph.calls)
    assert rollout is not None and rollout.name == "rollout"
    assert load_graph(graph_to_mapping(graph)) == graph
    assert [call.name for call in graph.calls] == ["rollout", "reward", "ref", "credit", "train"]
    assert load_graph(find_graph("grpo")).evaluate is None, "the control"


def test_rewards_of_every_kind(folder: Path) -> None:
    def scores(use: str) -> dict[str, str]:
        graph = load(folder, ("reward: {use: rewards.last_number}", f"reward: {use}"))
        assert load_graph(graph_to_mapping(graph)) == graph
        assert graph.evaluate is not None and graph.folder
        return dict(graph.evaluate.graph.calls[1].reads)

    assert scores("{use: 'eval_rewards:columns'}") == {
        "completions": f"{EVAL}.completion", "answer": "answer", "prompt": "prompt", "prompts": "prompt",
    }  # fmt: skip
    assert scores("{use: 'eval_rewards:mine', options: {weight: 2.0}}") == {
        "said": f"{EVAL}.completion", "truth": "answer",
    }  # fmt: skip
    assert scores("{use: 'eval_rewards:mine', reads: {truth: prompt}}")["truth"] == "prompt"


def test_stages_are_counted_with_their_largest(folder: Path) -> None:
    graph = load(folder, ("max_new_tokens: 16", "max_new_tokens: [[5, 8], [null, 32]]"))
    assert graph.evaluate is not None
    assert graph.evaluate.graph.calls[0].sampling == Sampling(32, temperature=0.6)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (
            "every: 20 steps\n  data",
            "every: 20\n  data",
            "evaluate.every: found 20, expected a count",
        ),
        ("    batch: 40 prompts\n", "", "'batch' is missing; it says how many prompts are answered"),
        ("batch: 40 prompts\n  samples", "batch: 40 samples\n  samples", "expected a number of prompts"),
        ("  samples: 4\n", "  samples: 0\n", "evaluate.samples"),
        ("rewards.last_number}\n  keep", "advantages.grpo}\n  keep", "which is not in its data"),
        ("rewards.last_number}\n  keep", "eval_rewards:stateful}\n  keep", "is no reward"),
        ("rewards.last_number}\n  keep", "rewards.lost_number}\n  keep", "unknown function"),
        ("  keep_best: true", "  keep_bets: true", "did you mean 'keep_best'?"),
        ("  reward: {use: rewards.last_number}\n  keep", "  keep", "'reward' is missing"),
        (
            "fields: {prompt: question, answer: answer}\n    batch",
            "fields: {question: question, answer: answer}\n    batch",
            "the rollout reads the prompt 'prompt'",
        ),
        ("    batch: 40 prompts\n", "    batch: 40 prompts\n    max_length: 5000\n", "expected at most 1024"),
        ("max_staleness: 0", "max_staleness: 1", "is for synchronous runs"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, old: str, new: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        load(folder, (old, new))
    assert part in str(caught.value)


def test_without_a_rollout_there_is_nothing_to_evaluate(folder: Path) -> None:
    with pytest.raises(InputError, match="no call generates"):
        load(folder, graph="sft")


def test_explained(folder: Path) -> None:
    text = explain_batch(load(folder, ("max_new_tokens: 16", "max_new_tokens: [[5, 8], [null, 32]]")))
    assert "evaluation: every 20 steps and at the end, 40 prompts × 4 samples, judged by" in text
    assert "rewards.last_number; the checkpoint of the best is kept" in text
    assert "new tokens of a response, at most: 8 to step 5, 32 to the end" in text
    plain = explain_batch(load_graph(find_graph("grpo")))
    assert "evaluation" not in plain and "to the end" not in plain
