"""Steps that are not all alike, for real: groups that are replaced, stages, a function that keeps state, and
evaluations in between.

The same samples and the same weights under any layout, and when a run goes on from a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import close, samples, weights, write_graph

from realflow.api import plan
from realflow.graph import load_graph
from realflow.launch.local import supervise
from realflow.observe.metrics import read_metrics
from realflow.runtime.best import read_best

FUNCTIONS = """\
import torch

from realflow.graph import function

READS = {"rewards": "sample float", "group_ids": "sample int field=group_id"}

@function(reads=READS, writes={"stays": "sample bool"}, scope="group")
def decide(rewards, group_ids):
    stays = torch.empty(len(rewards), dtype=torch.bool)
    for group in group_ids.unique():
        mine = group_ids == group
        stays[mine] = round(float(rewards[mine].sum()) * 800) % 3 != 0
    return stays

@function(
    reads={"rewards": "sample float"},
    writes={"advantages": "sample float"},
    scope="batch",
    state={"mean": 0.0, "steps": 0},
)
def baseline(rewards, *, state, rate=0.5):
    mean = (1 - rate) * state["mean"] + rate * float(rewards.double().mean())
    return {
        "advantages": rewards - state["mean"],
        "state": {"mean": mean, "steps": state["steps"] + 1},
        "metrics": {"baseline": mean, "baseline/steps": state["steps"] + 1},
    }
"""
EVALUATE = """\
evaluate:
  every: 2 steps
  data:
    source: jsonl
    path: {path}
    fields: {{prompt: prompt, answer: answer, source: kind}}
    batch: 5 prompts
  samples: 3
  temperature: 0.5
  reward: {{use: "my_rewards:letters"}}
  keep_best: true
"""
TOLD = ("refill/", "baseline", "eval/reward", "eval/a/", "eval/response")
LAYOUTS = [{"rollout": "d2", "train": "d2", "ref": "d2"}, {"rollout": "p2", "train": "t2", "ref": "d1@1"}]


def uneven_graph(folder: Path) -> Path:
    path = write_graph(folder)
    (folder / "uneven.py").write_text(FUNCTIONS)
    text = path.read_text()
    text = text.replace("    max_new_tokens: 8\n", '    max_new_tokens: [[1, 3], [3, 5], [null, 8]]\n'
                        '    refill: {use: "uneven:decide", most: 3}\n')  # fmt: skip
    text = text.replace("    use: advantages.grpo\n", '    use: "uneven:baseline"\n')
    assert "refill" in text and "baseline" in text
    rows = [{"prompt": f"{i}-{i}=", "answer": "0", "kind": "ab"[i % 2]} for i in range(5)]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(text + EVALUATE.format(path=folder / "held.jsonl"))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The graph, and four steps of it on one rank with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("uneven")
    graph = uneven_graph(folder)
    supervise(plan(load_graph(graph, ["steps=4"]), devices=1, layouts="d1"), folder / "whole", quiet=True)
    return graph, folder / "whole"


def test_what_a_run_tells(whole: tuple[Path, Path]) -> None:
    _, run_dir = whole
    metrics, rows = read_metrics(run_dir), samples(run_dir)
    groups: dict[int, set[int]] = {step: set() for step in range(4)}
    for row in rows.values():
        groups[row["step"]].add(row["group_id"])
        assert row["length"] <= (3, 5, 5, 8)[row["step"]]
    assert max(row["length"] for row in rows.values() if row["step"] == 3) > 5
    kept = [row["refill/kept"] for row in metrics]
    assert [len(groups[step]) for step in range(4)] == kept
    assert all(row["refill/dropped"] > 0 for row in metrics), "nothing was replaced: the test shows nothing"
    assert max(row["refill/rounds"] for row in metrics) > 1
    cursor = carried(run_dir, 4)
    assert cursor["next_prompt"] == sum(row["refill/kept"] + row["refill/dropped"] for row in metrics)
    assert [row["baseline/steps"] for row in metrics] == [1, 2, 3, 4]
    assert cursor["states"]["credit"] == {"mean": pytest.approx(metrics[-1]["baseline"]), "steps": 4}
    assert all(max(groups[step]) < min(groups[step + 1]) for step in range(3))


def test_what_evaluations_tell(whole: tuple[Path, Path]) -> None:
    _, run_dir = whole
    told = [{k: v for k, v in row.items() if k.startswith("eval/")} for row in read_metrics(run_dir)]
    assert [bool(row) for row in told] == [False, True, False, True]
    for row in (told[1], told[3]):
        a, b, whole_mean = (row[f"eval/{part}reward/mean"] for part in ("a/", "b/", ""))
        assert whole_mean == pytest.approx((3 * a + 2 * b) / 5), "5 prompts, of which 3 are of source a"
        assert row["eval/missing"] == 0 and 0 <= row["eval/pass@1"] <= 1
        assert 1 <= row["eval/response_length/mean"] <= 8
    rewards = {step + 1: told[step]["eval/reward/mean"] for step in (1, 3)}
    best = max(rewards, key=lambda step: (rewards[step], -step))
    assert read_best(run_dir) == (best, rewards[best])
    checkpoints = run_dir / "checkpoints"
    ours, theirs = checkpoints / "best", checkpoints / f"step-{best:06d}"
    assert (ours / "cursor.json").read_text() == (theirs / "cursor.json").read_text()
    assert (ours / "actor" / "config.json").exists()


@pytest.mark.full
def test_evaluations_change_nothing(whole: tuple[Path, Path], tmp_path: Path) -> None:
    graph, reference = whole
    plain = replace(load_graph(graph, ["steps=4"]), evaluate=None)
    supervise(plan(plain, devices=1, layouts="d1"), tmp_path / "run", quiet=True)
    same(tmp_path / "run", reference, ("refill/", "baseline"))


def carried(run_dir: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (run_dir / "checkpoints" / f"step-{step:06d}" / "cursor.json").read_text()
    )
    return found


@pytest.mark.parametrize("layouts", [LAYOUTS[0], pytest.param(LAYOUTS[1], marks=pytest.mark.full)])
def test_the_same_under_any_layout(whole: tuple[Path, Path], tmp_path: Path, layouts: dict[str, str]) -> None:
    graph, reference = whole
    made = plan(load_graph(graph, ["steps=4"]), devices=2, layouts=layouts)
    supervise(made, tmp_path / "run", quiet=True)
    same(tmp_path / "run", reference)


@pytest.mark.parametrize("layouts", [LAYOUTS[1], pytest.param(LAYOUTS[0], marks=pytest.mark.full)])
def test_a_run_goes_on(whole: tuple[Path, Path], tmp_path: Path, layouts: dict[str, str]) -> None:
    graph, reference = whole
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    other = plan(load_graph(graph, ["steps=4"]), devices=2, layouts=layouts)
    supervise(other, run_dir, quiet=True, resume=True)
    same(run_dir, reference)


def same(run_dir: Path, reference: Path, names: tuple[str, ...] = TOLD) -> None:
    ours, theirs = samples(run_dir), samples(reference)
    for name in ("completion", "rewards", "group_id", "step"):
        assert {s: row[name] for s, row in ours.items()} == {s: row[name] for s, row in theirs.items()}
    assert close(weights(run_dir, 4), weights(reference, 4), weights(reference, 2)) > 1e-3
    told = [
        {name: value for name, value in row.items() if name.startswith(names)}
        for row in (*read_metrics(run_dir), *read_metrics(reference))
    ]
    assert len(told) == 8 and told[:4] == [pytest.approx(row) for row in told[4:]]
    assert carried(run_dir, 4)["next_prompt"] == carried(reference, 4)["next_prompt"]
    if names == TOLD:
        assert read_best(run_dir) == pytest.approx(read_best(reference))
