"""Steps that are not all alike, for real: groups that are replaced, stages, and a function that keeps state.

The same samples and the same weights under any layout, and when a run goes on from a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import close, samples, weights, write_graph

from realflow.api import plan
from realflow.graph import load_graph
from realflow.launch.local import supervise
from realflow.observe.metrics import read_metrics

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
LAYOUTS = [{"rollout": "d2", "train": "d2", "ref": "d2"}, {"rollout": "p2", "train": "t2", "ref": "d1@1"}]


def uneven_graph(folder: Path) -> Path:
    path = write_graph(folder)
    (folder / "uneven.py").write_text(FUNCTIONS)
    text = path.read_text()
    text = text.replace("    max_new_tokens: 8\n", '    max_new_tokens: [[1, 3], [3, 5], [null, 8]]\n'
                        '    refill: {use: "uneven:decide", most: 3}\n')  # fmt: skip
    text = text.replace("    use: advantages.grpo\n", '    use: "uneven:baseline"\n')
    assert "refill" in text and "baseline" in text
    path.write_text(text)
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
    assert sorted(groups[0] | groups[1])[0] >= 0 and max(groups[0]) < min(groups[1])


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


def same(run_dir: Path, reference: Path) -> None:
    ours, theirs = samples(run_dir), samples(reference)
    for name in ("completion", "rewards", "group_id", "step"):
        assert {s: row[name] for s, row in ours.items()} == {s: row[name] for s, row in theirs.items()}
    assert close(weights(run_dir, 4), weights(reference, 4), weights(reference, 2)) > 1e-3
    told = [
        {name: value for name, value in row.items() if name.startswith(("refill/", "baseline"))}
        for row in (*read_metrics(run_dir), *read_metrics(reference))
    ]
    assert len(told) == 8 and told[:4] == [pytest.approx(row) for row in told[4:]]
    assert carried(run_dir, 4)["next_prompt"] == carried(reference, 4)["next_prompt"]
