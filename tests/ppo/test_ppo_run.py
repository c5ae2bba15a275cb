"""Real runs of graphs/ppo.yaml at tiny size: four models, each call with a layout and ranks of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ppo_tiny import MOVING, RATE, STEPS, average, execute, follows, ppo_graph, samples, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from realflow.api import plan, run
from realflow.launch.local import supervise
from realflow.observe.metrics import read_metrics

LAYOUTS = {
    "rollout": "d2t2@0-3",
    "reward": "p2@2-3",
    "ref": "t2@0-1",
    "values": "d3@1-3",
    "train": "t2p2@0-3",
    "train_critic": "d2p2@0-3",
    "kl": "d1@0",
    "scale": "d1@0",
    "credit": "d1@0",
}
FUNCTIONS = ("kl", "scale", "credit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ppo")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run on one rank."""
    return execute(ppo_graph(folder, *MOVING), folder / "one", 1)


def starts(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What actor and critic started from: the critic from the reward model, with its head."""
    files = {"actor": "actor", "critic": "scorer"}
    return {name: load_file(folder / file / "model.safetensors") for name, file in files.items()}


def updates(run_dir: Path, folder: Path, model: str) -> dict[str, torch.Tensor]:
    start = starts(folder)[model]
    trained = weights(run_dir, model)
    assert trained.keys() == start.keys()
    return {name: value.double() - start[name].double() for name, value in trained.items()}


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


NUMBERS = (
    "actor/grad_norm", "critic/grad_norm", "actor/pg_loss", "critic/vf_loss", "actor/reward_kl_penalty",
    "actor/reward_kl_penalty_coeff", "critic/return_mean", "critic/return_std",
)  # fmt: skip


def same_numbers(mine: Path, reference: Path, folder: Path) -> None:
    """Samples, rewards, norms of every step's gradients, and the updates: float64, 1e-8."""
    ours, theirs = samples(mine), samples(reference)
    assert ours.keys() == theirs.keys() == set(range(STEPS * 12))
    for sample, row in theirs.items():
        for name in ("completion", "finish_reason", "length"):
            assert ours[sample][name] == row[name], (sample, name)
        assert ours[sample]["rewards"] == pytest.approx(row["rewards"], rel=1e-8, abs=1e-12)
    for ours_, theirs_ in zip(read_metrics(mine), read_metrics(reference), strict=True):
        for name in NUMBERS:
            assert ours_[name] == pytest.approx(theirs_[name], rel=1e-8, abs=1e-12), (ours_["step"], name)
    assert difference(mine, reference, folder) <= 1e-8


def test_six_calls_in_six_layouts_learn_what_one_rank_learns(
    folder: Path, alone: Path, tmp_path: Path
) -> None:
    """Five steps; actor and critic move to other layouts in each, ref and reward stay on ranks apart."""
    assert len({layout.split("@")[0] for name, layout in LAYOUTS.items() if name not in FUNCTIONS}) == 6
    run_dir = execute(ppo_graph(folder, *MOVING), tmp_path / "four", 4, **LAYOUTS)
    same_numbers(run_dir, alone, folder)
    assert follows(folder, run_dir) < 1e-9  # ref in t2 on two of the four ranks, the actor in t2p2
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
    assert all(row["actor/kl_loss"] > 0 for row in rows)  # ref lags behind
    rewards = [row["rewards"] for row in samples(alone).values()]
    assert max(rewards) - min(rewards) > 0.1  # the reward model tells answers apart


def test_the_critic_starts_from_the_reward_model(folder: Path, alone: Path) -> None:
    """AdamW moves a weight by about its learning rate in each of the ten steps; the control is the actor."""
    scorer, actor = starts(folder)["critic"], starts(folder)["actor"]
    for name, value in weights(alone, "critic", 1).items():
        assert (value - scorer[name]).abs().max() < 2.5 * 1e-2, name
        assert name not in actor or (value - actor[name]).abs().max() > 0.1, name
    assert "score.weight" in scorer.keys() - actor.keys()


def test_the_reference_is_an_average_of_the_actor(folder: Path, alone: Path) -> None:
    """Of the actors of all steps, in float64; the controls are other rates, and one step less."""
    for step in range(1, STEPS + 1):
        assert follows(folder, alone, step=step) < 1e-9
    assert all(follows(folder, alone, rate) > 0.05 for rate in (0.0, 0.9 * RATE, 1 - RATE))
    late, early = weights(alone, "ref"), average(folder, alone, RATE, STEPS - 1)
    assert all((late[name] - value).abs().max() > 1e-6 for name, value in early.items())


def test_the_coefficient_adapts_by_the_published_rule(alone: Path) -> None:
    """TRL's controller, on the KL that the run itself reports."""
    rows, coef = read_metrics(alone), 0.1
    for row in rows:
        assert row["actor/reward_kl_penalty_coeff"] == pytest.approx(coef, rel=1e-9)
        error = min(max(row["actor/reward_kl_penalty"] / 0.01 - 1, -0.2), 0.2)
        coef *= 1 + error * 12 / 100
    assert abs(coef - 0.1) > 1e-3  # it moved


def test_returns_are_normalised_from_the_second_step_on(alone: Path) -> None:
    """Running mean and deviation of the rewards, by hand; the first step has those of its own."""
    rows, by_step = read_metrics(alone), samples(alone).values()
    for step, row in enumerate(rows):
        parts = [
            torch.tensor([s["rewards"] for s in by_step if s["step"] == past], dtype=torch.float64)
            for past in range(step + 1)
        ]
        shares = torch.tensor([0.99 ** (step - past) for past in range(step + 1)], dtype=torch.float64)
        mean = (torch.stack([part.mean() for part in parts]) * shares).sum() / shares.sum()
        square = (torch.stack([part.square().mean() for part in parts]) * shares).sum() / shares.sum()
        std = (square - mean**2).sqrt().clamp(0.1)
        assert row["critic/return_mean"] == pytest.approx(float(mean), rel=1e-6, abs=1e-9)
        assert row["critic/return_std"] == pytest.approx(float(std), rel=1e-6)


HALVES = {"*": "d2", "train": "t2", "ref": "d2"}, {"*": "t2", "train": "d2", "ref": "t2", "values": "d2"}


@pytest.mark.full
@pytest.mark.parametrize(("first", "second"), [HALVES, HALVES[::-1]])
def test_two_ranks_go_on_under_another_layout(
    folder: Path, alone: Path, tmp_path: Path, first: dict[str, str], second: dict[str, str]
) -> None:
    """From the third step's checkpoint: the reference, the coefficient and the scale are in it."""
    functions = dict.fromkeys(FUNCTIONS, "d1@0")
    graph = ppo_graph(folder, *MOVING)
    begun = plan(replace(graph, steps=3), devices=2, layouts={**first, **functions})
    run(begun, run_dir=tmp_path / "run", quiet=True)
    other = plan(graph, devices=2, layouts={**second, **functions})
    supervise(other, tmp_path / "run", quiet=True, resume=True)
    same_numbers(tmp_path / "run", alone, folder)
    assert all(follows(folder, tmp_path / "run", step=step) < 1e-9 for step in (3, 4, STEPS))
    assert follows(folder, tmp_path / "run", 0.9 * RATE) > 0.05  # the control


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
    other = execute(ppo_graph(folder, *MOVING, "critic_lr=5e-3"), tmp_path / "other", 1)
    assert difference(other, alone, folder) > 1e-4
