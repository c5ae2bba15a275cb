"""Real runs: fields of any name, other rollouts beside the one that is trained on, periodic training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import execute, samples, weights, write_graph
from safetensors.torch import load_file

from realflow.planfile import read_plan

EVALUATE = """\
  evaluate:
    model: actor
    op: generate
    batch: 6 prompts
    samples: ${samples}
    max_new_tokens: 5
    temperature: 0
    every: 2 steps
    writes:
      tokens: seen
      logprobs: seen_logprobs
      loss_mask: seen_mask
      versions: seen_versions
      finish_reason: seen_reason
      group_id: seen_group
      completion: seen_completion
  grade:
    op: function
    use: my_rewards:letters
    every: 2 steps
    reads: {completions: seen_completion}
    writes: {rewards: grades}
"""

SECOND = """\
  second:
    model: actor
    op: generate
    batch: 6 prompts
    samples: ${samples}
    max_new_tokens: 8
    reads: {prompt: question}
"""

RENAMED = {
    "fields: {prompt: prompt,": "fields: {question: prompt,",
    "    max_new_tokens: 8\n": "    max_new_tokens: 8\n"
    "    reads: {prompt: question}\n"
    "    writes: {tokens: spoken, logprobs: behaviour, loss_mask: mine, versions: ages,\n"
    "      finish_reason: why, group_id: family, completion: said}\n",
    "    timeout: 60\n": "    timeout: 60\n    reads: {completions: said}\n",
    "    use: logprobs\n": "    use: logprobs\n    reads: {tokens: spoken, loss_mask: mine}\n",
    "    use: advantages.grpo\n": "    use: advantages.grpo\n    reads: {group_ids: family}\n",
    "    use: losses.ppo_clip\n": "    use: losses.ppo_clip\n"
    "    reads: {tokens: spoken, loss_mask: mine, old_logprobs: behaviour}\n",
}
"""What to replace in the graph so that every field of the rollout has another name."""


def changed(graph: Path, name: str, replacements: dict[str, str], calls: str = "") -> Path:
    """Another graph file beside `graph`."""
    text = graph.read_text()
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    text = text.replace("calls:\n", f"calls:\n{calls}")  # the added calls come first in the file
    path = graph.with_name(f"{name}.yaml")
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The graph, and its run on one rank."""
    folder = tmp_path_factory.mktemp("plain")
    graph = write_graph(folder, timeout=60)
    execute(graph, folder / "run", 1)
    return graph, folder / "run"


def assert_trained_alike(ours: Path, theirs: Path, start: Path, limit: float = 1e-8) -> None:
    first, mine, other = load_file(start / "model.safetensors"), weights(ours), weights(theirs)
    for name, value in first.items():
        update = other[name].double() - value.double()
        assert torch.linalg.norm(update) > 0
        assert torch.linalg.norm(mine[name].double() - other[name].double()) <= limit * torch.linalg.norm(
            update
        ), name


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_an_evaluation_changes_nothing(plain: tuple[Path, Path], tmp_path: Path) -> None:
    graph, reference = plain
    result = execute(changed(graph, "evaluated", {}, EVALUATE), tmp_path / "run", 1)
    ours, theirs = samples(result.run_dir), samples(reference)
    for sample, row in theirs.items():
        for name in ("completion", "rewards", "advantages", "length"):
            assert ours[sample][name] == row[name], (sample, name)
    assert_trained_alike(result.run_dir, reference, graph.parent / "model")
    lines, before = metrics(result.run_dir), metrics(reference)
    assert [("grade/grades/mean" in line) for line in lines] == [False, True, False]
    assert lines[1]["evaluate/response_length/max"] <= 5
    name = "response_length/mean"
    assert [line[name] for line in lines] == [line[name] for line in before]


def test_every_name_can_change_and_another_rollout_can_have_the_old_ones(
    plain: tuple[Path, Path], tmp_path: Path
) -> None:
    graph, reference = plain
    other = changed(graph, "renamed", RENAMED, SECOND)
    layouts = {"rollout": "d2@0-1", "second": "d1@0", "train": "d1@2", "ref": "d2@1-2"}
    result = execute(other, tmp_path / "run", 3, **layouts)
    ours, theirs = samples(result.run_dir), samples(reference)
    for sample, row in theirs.items():
        assert ours[sample]["said"] == row["completion"], "the trained rollout draws as it does alone"
        assert ours[sample]["prompt"] == row["prompt"]
        for name in ("rewards", "advantages", "length"):
            assert ours[sample][name] == row[name], (sample, name)
    apart = [ours[sample]["completion"] != ours[sample]["said"] for sample in ours]
    assert sum(apart) > len(apart) / 2, "the second rollout must not repeat the draws of the first"
    assert_trained_alike(result.run_dir, reference, graph.parent / "model")
    planned = sum(realloc.bytes for realloc in read_plan(result.run_dir / "plan.yaml").reallocs)
    moved = [line.get("realloc/actor/bytes", 0) for line in metrics(result.run_dir)]
    assert sum(moved) == 2 * planned, moved


def test_training_every_other_step(plain: tuple[Path, Path], tmp_path: Path) -> None:
    graph, reference = plain
    other = changed(graph, "seldom", {"    minibatches: ": "    every: 2 steps\n    minibatches: "})
    result = execute(other, tmp_path / "run", 2, rollout="d1@0", train="d1@1")
    assert ["actor/loss" in line for line in metrics(result.run_dir)] == [False, True, False]
    ours, theirs = samples(result.run_dir), samples(reference)
    first = [ours[sample]["completion"] == theirs[sample]["completion"] for sample in range(24)]
    assert all(first)
