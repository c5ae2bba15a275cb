"""Real runs of a tiny graph: the layout never changes the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import execute, samples, weights, write_graph

PLACES = {
    "one": (1, {}),
    "two": (2, {}),
    "four": (4, {}),
    "disjoint": (
        4,
        {"rollout": "d2@0-1", "train": "d1@2", "ref": "d1@3", "reward": "d2@0-1", "credit": "d1@2"},
    ),
    "mixed": (
        3,
        {"rollout": "d3@0-2", "train": "d2@1-2", "ref": "d1@0", "reward": "d1@1", "credit": "d3@0-2"},
    ),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The graph, and its run on one rank."""
    folder = tmp_path_factory.mktemp("runs")
    graph = write_graph(folder)
    execute(graph, folder / "one", 1)
    return graph, folder / "one"


@pytest.mark.parametrize("where", ["two", "four", "disjoint", "mixed"])
def test_the_layout_never_changes_the_answer(alone: tuple[Path, Path], tmp_path: Path, where: str) -> None:
    graph, reference = alone
    devices, layouts = PLACES[where]
    result = execute(graph, tmp_path / "run", devices, **layouts)
    ours, theirs = samples(result.run_dir), samples(reference)
    assert ours.keys() == theirs.keys() == set(range(3 * 6 * 4))
    for sample, row in theirs.items():
        for name in ("completion", "finish_reason", "rewards", "length"):
            assert ours[sample][name] == row[name], (sample, name)
    first, mine, start = weights(reference), weights(result.run_dir), weights_of(graph.parent / "model")
    moved = 0.0
    for name, value in first.items():
        update = value.double() - start[name].double()
        other = mine[name].double() - start[name].double()
        assert torch.linalg.norm(other - update) <= 1e-8 * torch.linalg.norm(update), name
        moved = max(moved, float(update.abs().max()))
    assert moved > 1e-2


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


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
