"""A run that was stopped goes on with the same numbers, also under another plan."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import close, samples, weights, write_graph
from safetensors.torch import load_file

from realflow.api import plan
from realflow.errors import InputError
from realflow.graph import load_graph
from realflow.launch.local import supervise


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The graph, and four steps of it on one rank with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("resume")
    graph = write_graph(folder)
    supervise(plan(load_graph(graph, ["steps=4"]), devices=1, layouts="d1"), folder / "whole", quiet=True)
    return graph, folder / "whole"


def stopped_after_two(whole: Path, run_dir: Path) -> None:
    """A copy of the run as a kill in its third step would have left it."""
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:3]) + '{"step": 3, "ti')
    (run_dir / ".rendezvous").write_text("left over")


@pytest.mark.parametrize(
    "layouts",
    [
        {"rollout": "d2", "train": "p2:offload", "ref": "t2"},
        pytest.param({"rollout": "p2", "train": "t2", "ref": "d1@1"}, marks=pytest.mark.full),
        pytest.param({"rollout": "d1@0", "train": "d2@0-1", "ref": "d1@1"}, marks=pytest.mark.full),
    ],
)
def test_resume_under_another_plan(whole: tuple[Path, Path], tmp_path: Path, layouts: dict[str, str]) -> None:
    graph, reference = whole
    run_dir = tmp_path / "run"
    stopped_after_two(reference, run_dir)
    other = plan(load_graph(graph, ["steps=4"]), devices=2, layouts=layouts)
    result = supervise(other, run_dir, quiet=True, resume=True)
    assert [row["step"] for row in result.metrics] == [0, 1, 2, 3]
    assert close(weights(run_dir, 4), weights(reference, 4), weights(reference, 2)) > 1e-3
    ours, theirs = samples(run_dir), samples(reference)
    assert {s: row["completion"] for s, row in ours.items()} == {
        s: row["completion"] for s, row in theirs.items()
    }


@pytest.mark.full
def test_what_many_ranks_wrote_one_rank_continues(whole: tuple[Path, Path], tmp_path: Path) -> None:
    graph, reference = whole
    run_dir, loaded = tmp_path / "run", load_graph(graph, ["steps=4"])
    layouts = {"rollout": "d4", "train": "d2p2", "ref": "t2@0-1"}
    first = replace(loaded, steps=2)
    supervise(plan(first, devices=4, layouts=layouts), run_dir, quiet=True)
    supervise(plan(loaded, devices=1, layouts="d1"), run_dir, quiet=True, resume=True)
    assert close(weights(run_dir, 4), weights(reference, 4), weights(reference, 2)) > 1e-3


def test_a_damaged_checkpoint_is_refused(whole: tuple[Path, Path], tmp_path: Path) -> None:
    graph, reference = whole
    run_dir = tmp_path / "run"
    stopped_after_two(reference, run_dir)
    shard = next((run_dir / "checkpoints").rglob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    same = plan(load_graph(graph, ["steps=4"]), devices=1, layouts="d1")
    with pytest.raises(InputError, match="damaged"):
        supervise(same, run_dir, quiet=True, resume=True)


def test_another_data_order_is_refused(whole: tuple[Path, Path], tmp_path: Path) -> None:
    graph, reference = whole
    run_dir = tmp_path / "run"
    stopped_after_two(reference, run_dir)
    other = plan(load_graph(graph, ["steps=4", "samples=2", "minibatches=1"]), devices=1, layouts="d1")
    with pytest.raises(InputError, match="samples was 4 and is 2"):
        supervise(other, run_dir, quiet=True, resume=True)


def test_nothing_to_continue(whole: tuple[Path, Path], tmp_path: Path) -> None:
    graph, reference = whole
    same = plan(load_graph(graph, ["steps=4"]), devices=1, layouts="d1")
    with pytest.raises(InputError, match="has done its 4 steps"):
        supervise(same, reference, quiet=True, resume=True)
    with pytest.raises(InputError, match="no checkpoint"):
        supervise(same, tmp_path, quiet=True, resume=True)


def test_restarts(tmp_path: Path) -> None:
    graph = write_graph(tmp_path, reward="my_rewards:fails_once")
    made = plan(load_graph(graph, ["steps=4"]), devices=1, layouts="d1")
    result = supervise(made, tmp_path / "run", quiet=True, restarts=1)
    assert [row["step"] for row in result.metrics] == [0, 1, 2, 3]
    assert (tmp_path / "failed.txt").exists(), "it never failed"
    assert not (tmp_path / "run" / "error.txt").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert sorted(row["sample_id"] for row in rows) == list(range(4 * 6 * 4))


@pytest.mark.full
def test_the_average_of_a_bfloat16_follower_goes_on(tmp_path: Path) -> None:
    """Its float32 part is in the checkpoint: without that it would begin again at the rounded weights."""
    graph = load_graph(
        write_graph(tmp_path, follows="{model: actor, decay: 0.75}"), ["steps=4", "dtype=bfloat16"]
    )
    made = plan(graph, devices=2, layouts={"rollout": "d2", "train": "p2", "ref": "t2:offload"})
    reference = tmp_path / "whole"
    supervise(made, reference, quiet=True)
    run_dir = tmp_path / "run"
    stopped_after_two(reference, run_dir)
    supervise(made, run_dir, quiet=True, resume=True)
    ours, theirs = averages(run_dir), averages(reference)
    assert ours.keys() == theirs.keys() == averages(reference, 2).keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in theirs.values())
    weights_of = weights(run_dir, 4, "ref")
    for key, value in ours.items():
        _, name, box = key.split("|")
        part = tuple(slice(*map(int, span.split(":"))) for span in box.split(","))
        assert torch.equal(weights_of[name][part], value.bfloat16()), name


def averages(run_dir: Path, step: int = 4) -> dict[str, torch.Tensor]:
    """What a checkpoint has of the follower beside its weights."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}" / "state" / "ref"
    files = [load_file(path) for path in sorted(folder.iterdir())]
    assert len(files) == 2
    return {key: value for file in files for key, value in file.items()}
