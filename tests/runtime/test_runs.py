"""Real runs of a tiny graph: the layout never changes the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import close, execute, samples, weights, write_graph
from safetensors.torch import load_file

from realflow.launch.local import RunResult
from realflow.observe.metrics import read_metrics
from realflow.planfile import read_plan

HERE = {
    # weights move between stages and tensor shards on the same ranks; some pieces stay where they are
    "crossed": (2, {"rollout": "t2", "train": "p2", "ref": "d2:offload"}),
    # key and value heads that do not divide, both axes in one call, and no two layouts alike
    "meshes": (4, {"rollout": "d2p2", "train": "d2t2:sequence_parallel,recompute", "ref": "t4:offload"}),
    # rollout and training on ranks of their own, with all that can be put away put away
    "disjoint": (
        4,
        {
            "rollout": "p2@0-1:free",
            "train": "t2@2-3:offload",
            "ref": "d1@3:offload",
            "reward": "d2@0-1",
            "credit": "d1@2",
        },
    ),
}
MORE = {
    "one t2": (2, {"*": "t2"}),
    "one p2": (2, {"*": "p2"}),
    "one d2t2": (4, {"*": "d2t2"}),
    "data": (4, {}),
    "apart": (
        4,
        {"rollout": "d2@0-1", "train": "d1@2", "ref": "d1@3", "reward": "d2@0-1", "credit": "d1@2"},
    ),
    "mixed": (
        3,
        {"rollout": "d3@0-2", "train": "d2@1-2", "ref": "d1@0", "reward": "d1@1", "credit": "d3@0-2"},
    ),
    "bubble": (4, {"rollout": "d4", "train": "t2p2:zero_bubble,offload", "ref": "p2@2-3"}),
    "other groups": (3, {"rollout": "t2@0,1", "train": "t2@0,2", "ref": "t3"}),
    "freed": (2, {"rollout": "p2:free", "train": "t2", "ref": "t2"}),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The graph, and its run on one rank."""
    folder = tmp_path_factory.mktemp("runs")
    graph = write_graph(folder)
    execute(graph, folder / "one", 1)
    return graph, folder / "one"


@pytest.mark.parametrize("where", [*HERE, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_the_layout_never_changes_the_answer(alone: tuple[Path, Path], tmp_path: Path, where: str) -> None:
    graph, reference = alone
    devices, layouts = {**HERE, **MORE}[where]
    result = execute(graph, tmp_path / "run", devices, **layouts)
    same_samples(result.run_dir, reference)
    start = load_file(graph.parent / "model" / "model.safetensors")
    assert close(weights(result.run_dir), weights(reference), start) > 1e-2
    moves_are_reported(result)


def same_samples(ours: Path, theirs: Path) -> None:
    mine, others = samples(ours), samples(theirs)
    assert mine.keys() == others.keys() == set(range(3 * 6 * 4))
    for sample, row in others.items():
        for name in ("completion", "finish_reason", "rewards", "length"):
            assert mine[sample][name] == row[name], (sample, name)


def moves_are_reported(result: RunResult) -> None:
    """In every step but the first the bytes that the plan has, in seconds above the floor."""
    reallocs = [r for r in read_plan(result.run_dir / "plan.yaml").reallocs if not r.follower]
    for row in result.metrics[1:]:
        if reallocs:
            assert row["realloc/actor/bytes"] == sum(realloc.bytes for realloc in reallocs)
            assert row["realloc/actor/seconds"] > row["realloc/actor/floor_seconds"] >= 0
        else:
            assert not any(name.startswith("realloc/") for name in row)


def test_another_seed_gives_other_samples(alone: tuple[Path, Path], tmp_path: Path) -> None:
    graph, reference = alone
    text = graph.read_text() + "seed: 2\n"
    other = graph.with_name("other.yaml")
    other.write_text(text)
    result = execute(other, tmp_path / "run", 1, ("steps=1",))
    ours, theirs = samples(result.run_dir), samples(reference)
    assert sum(ours[s]["completion"] != theirs[s]["completion"] for s in ours) > len(ours) / 2


def test_the_run_directory(alone: tuple[Path, Path]) -> None:
    _, run_dir = alone
    present = {path.name for path in run_dir.iterdir()}
    assert {
        "plan.yaml",
        "graph.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "trace.json",
        "checkpoints",
        "tensorboard",
    } <= present


DECAY = 0.75


@pytest.mark.parametrize(
    ("devices", "layouts"), [(3, {"rollout": "d2@0-1", "train": "p2@0-1", "ref": "t2@1-2"})]
)
def test_a_reference_follows_the_actor(tmp_path: Path, devices: int, layouts: dict[str, str]) -> None:
    """After each step: DECAY of itself, the rest of the actor; also from a checkpoint on."""
    graph = write_graph(tmp_path, follows=f"{{model: actor, decay: {DECAY}}}")
    runs = {
        name: execute(graph, tmp_path / name, count, ("steps=4",), **where).run_dir
        for name, count, where in (("one", 1, {}), ("many", devices, layouts))
    }
    start = load_file(tmp_path / "model" / "model.safetensors")
    for run_dir in runs.values():
        ref, actor = ({step: weights(run_dir, step, m) for step in (2, 4)} for m in ("ref", "actor"))
        for name, first in start.items():
            early = float(torch.linalg.norm(ref[2][name] - first))
            late = float(torch.linalg.norm(ref[4][name] - first))
            whole = float(torch.linalg.norm(actor[4][name] - first))
            assert 0 < early < whole and 0 < late < whole, "it lags behind"
    rows = read_metrics(runs["many"])
    assert [row["realloc/ref/bytes"] > 0 for row in rows] == [True] * 4, "each step's move, the last one too"
    for step in (2, 4):
        assert close(weights(runs["many"], step, "ref"), weights(runs["one"], step, "ref"), start) > 1e-3
    ours, theirs = samples(runs["many"]), samples(runs["one"])
    assert {s: row["completion"] for s, row in ours.items()} == {
        s: r["completion"] for s, r in theirs.items()
    }
