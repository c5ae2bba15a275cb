"""The shipped graphs of pairs through mpirun: the loss falls, and the number of ranks changes no weight."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from runs import close, weights
from safetensors.torch import load_file
from tiny import tiny_model

from realflow.api import plan, run
from realflow.data.examples import sum_pairs
from realflow.errors import InputError, RunError
from realflow.graph import find_graph, load_graph
from realflow.models.causal import load_model

STEPS = 5
TINY = ("dtype=float64", "prompts=6", "minibatches=2", "lr=5e-3", f"steps={STEPS}")


def execute(name: str | Path, model: Path, run_dir: Path, devices: int) -> Path:
    """A run of a graph over six pairs, again and again; micro-batches hold about two of them."""
    graph = load_graph(find_graph(name), [f"model={model}", *TINY])
    graph = replace(graph, data=replace(graph.data, size=6))
    made = plan(graph, devices=devices, layouts=f"d{devices}", micro_batch_tokens=500)
    run(made, run_dir=run_dir, quiet=True)
    return run_dir


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("start") / "model", dtype="float64", seed=3)


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "trained"), [("dpo", "actor"), pytest.param("reward_model", "reward", marks=pytest.mark.full)]
)
def test_two_ranks_learn_what_one_learns(tmp_path: Path, model: Path, name: str, trained: str) -> None:
    alone, both = (execute(name, model, tmp_path / f"on-{n}", n) for n in (1, 2))
    found, other = metrics(both), metrics(alone)
    for key in ("loss", "accuracy", "margin"):
        mine = [row[f"{trained}/{key}"] for row in found]
        assert mine == pytest.approx([row[f"{trained}/{key}"] for row in other], rel=1e-8, abs=1e-12)
    assert found[0][f"{trained}/loss"] == pytest.approx(0.6931, abs=0.08)  # log 2: nothing is known yet
    assert found[-1][f"{trained}/loss"] < found[0][f"{trained}/loss"] - 0.05
    start = load_file(model / "model.safetensors")
    ours, theirs = (weights(run_dir, STEPS, trained) for run_dir in (alone, both))
    if name == "reward_model":
        start = {key: start.get(key, value * 0) for key, value in ours.items()}
        load_model(both / "checkpoints" / f"step-{STEPS:06d}" / trained, dtype="float64", head="reward")
    assert close(ours, theirs, {key: start[key] for key in ours}) > 1e-3


@pytest.mark.full
def test_pairs_that_are_divided_are_refused(tmp_path: Path, model: Path) -> None:
    """The control: the same loss, declared as one that looks at single samples."""
    (tmp_path / "alone.py").write_text(
        "from realflow.algorithms import losses\n"
        "from realflow.graph import loss\n\n"
        'READS = {"group_ids": "sample int field=group_id", "chosen": "sample bool"}\n\n'
        '@loss(reads=READS, needs=("scores",))\n'
        "def alone(scores, mask, lengths, group_ids, chosen):\n"
        "    return losses.reward_model(scores, mask, lengths, group_ids, chosen)\n"
    )
    text = find_graph("reward_model").read_text().replace("losses.reward_model", '"alone:alone"')
    (tmp_path / "alone.yaml").write_text(text)
    with pytest.raises(RunError, match="expected one of each"):
        execute(tmp_path / "alone.yaml", model, tmp_path / "run", 1)


def test_example_pairs() -> None:
    rows, held_out = sum_pairs(wrong=4), sum_pairs(wrong=4, use="test")
    assert len(rows) == 4 * 140 and len(held_out) == 4 * 60
    assert not {row["question"] for row in rows} & {row["question"] for row in held_out}
    for row in (*rows, *held_out):
        a, sign, b = row["question"].split(": ")[1].removesuffix(" =").split(" ")
        right = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert row["chosen"] == str(right) != row["rejected"]
    for wrong in ({"wrong": 0}, {"test": 1.0}, {"use": "all"}):
        with pytest.raises(InputError, match="sum_pairs"):
            sum_pairs(**wrong)  # type: ignore[arg-type]


def test_example_pairs_hold_out_what_the_other_graphs_do() -> None:
    pytest.importorskip("reasoning_gym")
    from realflow.data.source import open_source

    graph = load_graph(find_graph("sft"))
    source = open_source(graph.data, seed=1)
    asked = {source.row(g)["prompt"] for g in range(len(source))}
    assert asked == {row["question"] for row in sum_pairs()}
