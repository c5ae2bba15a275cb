"""Real runs of graphs/ppo.yaml at tiny size: four models, each call with a layout and ranks of its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ppo_tiny import STEPS, execute, ppo_graph, samples, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from realflow.observe.metrics import read_metrics

LAYOUTS = {
    "rollout": "d2t2@0-3",
    "reward": "p2@2-3",
    "ref": "t2@0-1",
    "values": "d3@1-3",
    "train": "t2p2@0-3",
    "train_critic": "d2p2@0-3",
    "credit": "d1@0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ppo")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run on one rank."""
    return execute(ppo_graph(folder), folder / "one", 1)


def starts(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What actor and critic started from; the critic's head starts from zeros."""
    actor = load_file(folder / "actor" / "model.safetensors")
    return {"actor": actor, "critic": actor}


def updates(run_dir: Path, folder: Path, model: str) -> dict[str, torch.Tensor]:
    start = starts(folder)[model]
    return {
        name: value.double() - start.get(name, torch.zeros_like(value)).double()
        for name, value in weights(run_dir, model).items()
    }


def difference(mine: Path, reference: Path, folder: Path) -> float:
    """The largest relative difference of any tensor's update, over both trained models."""
    worst = 0.0
    for model in ("actor", "critic"):
        theirs, ours = updates(reference, folder, model), updates(mine, folder, model)
        assert ours.keys() == theirs.keys()
        for name, update in theirs.items():
            assert torch.linalg.norm(update) > 1e-5, (model, name)  # it moved
            relative = torch.linalg.norm(ours[name] - update) / torch.linalg.norm(update)
            worst = max(worst, float(relative))
    return worst


def same_numbers(mine: Path, reference: Path, folder: Path) -> None:
    """Samples, rewards, norms of every step's gradients, and the updates: float64, 1e-8."""
    ours, theirs = samples(mine), samples(reference)
    assert ours.keys() == theirs.keys() == set(range(STEPS * 12))
    for sample, row in theirs.items():
        for name in ("completion", "finish_reason", "length"):
            assert ours[sample][name] == row[name], (sample, name)
        assert ours[sample]["rewards"] == pytest.approx(row["rewards"], rel=1e-8, abs=1e-12)
    for ours_, theirs_ in zip(read_metrics(mine), read_metrics(reference), strict=True):
        for name in ("actor/grad_norm", "critic/grad_norm", "actor/pg_loss", "critic/vf_loss"):
            assert ours_[name] == pytest.approx(theirs_[name], rel=1e-8, abs=1e-12), (ours_["step"], name)
    assert difference(mine, reference, folder) <= 1e-8


def test_six_calls_in_six_layouts_learn_what_one_rank_learns(
    folder: Path, alone: Path, tmp_path: Path
) -> None:
    """Five steps; actor and critic move to other layouts in each, ref and reward stay on ranks apart."""
    assert len({layout.split("@")[0] for name, layout in LAYOUTS.items() if name != "credit"}) == 6
    run_dir = execute(ppo_graph(folder), tmp_path / "four", 4, **LAYOUTS)
    same_numbers(run_dir, alone, folder)
    last = read_metrics(run_dir)[-1]
    assert last["realloc/actor/bytes"] > 0 and last["realloc/critic/bytes"] > 0


@pytest.mark.full
def test_gradients_are_those_of_one_rank(folder: Path, tmp_path: Path) -> None:
    """With this optimizer an update is the sum of the gradients themselves (times 1e-2): AdamW's
    normalisation would hide a gradient that is wrong by a factor."""
    descent = {"lr": 10.0, "eps": 1e3, "betas": [0.0, 0.0], "clip_norm": 1e9}
    one = execute(ppo_graph(folder, optimizer=descent), tmp_path / "one", 1)
    four = execute(ppo_graph(folder, optimizer=descent), tmp_path / "four", 4, **LAYOUTS)
    same_numbers(four, one, folder)


def test_the_run_on_one_rank_learns_and_says_so(alone: Path) -> None:
    rows = read_metrics(alone)
    for name in (
        "critic/rewards/mean", "critic/advantages/mean", "critic/returns/mean", "critic/vf_loss",
        "critic/vf_clipfrac", "critic/vpred_mean", "critic/grad_norm", "actor/pg_loss", "actor/kl_loss",
    ):  # fmt: skip
        assert all(math.isfinite(row[name]) for row in rows), name
    assert all(abs(row["critic/advantages/mean"]) < 1e-9 for row in rows)  # whitened
    assert rows[-1]["actor/kl_loss"] > rows[0]["actor/kl_loss"]  # ref stays where it was
    rewards = [row["rewards"] for row in samples(alone).values()]
    assert max(rewards) - min(rewards) > 0.1  # the reward model tells answers apart


def test_both_trained_models_load_with_from_pretrained(alone: Path) -> None:
    step = alone / "checkpoints" / f"step-{STEPS:06d}"
    AutoModelForCausalLM.from_pretrained(step / "actor")
    critic, report = AutoModelForSequenceClassification.from_pretrained(
        step / "critic", output_loading_info=True
    )
    assert critic.config.num_labels == 1 and not report["missing_keys"], report
    assert critic.score.weight.abs().max() > 0


@pytest.mark.full
def test_another_critic_learns_something_else(folder: Path, alone: Path, tmp_path: Path) -> None:
    """The control: with another learning rate of the critic alone, the actor's updates differ too."""
    other = execute(ppo_graph(folder, "critic_lr=5e-3"), tmp_path / "other", 1)
    assert difference(other, alone, folder) > 1e-4
