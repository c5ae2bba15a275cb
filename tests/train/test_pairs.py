"""Losses of pairs and of sequences: however a minibatch is divided, gradients are the same; reward heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grid_ranks import differences, elements
from pair_ranks import CASES, CONTROLS, RANKS, Case, batches, launch, make_model, objective, reference
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification

from realflow.algorithms.losses import reward_model
from realflow.engines.infer import infer
from realflow.engines.train import TrainEngine
from realflow.errors import InputError
from realflow.graph.types import OptimizerSpec
from realflow.models.causal import load_model
from realflow.models.save import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("pairs"))


def collected(folder: Path, case: Case) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{case.name}.{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_replicas_of_several_micro_batches_equal_the_formula(folder: Path, case: Case) -> None:
    results = collected(folder, case)
    sizes = {
        name: len(t.flatten()) for name, t in load_file(folder / case.head / "model.safetensors").items()
    }
    assert elements(results, "g0") == sizes
    found = differences(results, "g0")
    assert max(found.values()) <= 1e-8, found
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["metrics"]["loss"] == pytest.approx(results[0]["loss"], rel=1e-10)
    if case.budget < 100:
        assert all(result["batches"] > 1 for result in results)


def test_controls_fail(folder: Path) -> None:
    """Tokens that count alike, where sequences should; and pairs that were divided, which a loss refuses."""
    token, divided = (collected(folder, case) for case in CONTROLS)
    assert max(differences(token, "g0").values()) > 1e-3
    assert any("expected one of each" in result["error"] for result in divided)


def trained(
    path: Path, case: Case, steps: int, lr: float = 1e-2
) -> tuple[TrainEngine, list[dict[str, float]]]:
    model = load_model(path, dtype="float64", head=case.head, new_head=True)
    engine = TrainEngine(model, OptimizerSpec(lr=lr, clip_norm=1.0))
    aim, found = objective(case), []
    for _ in range(steps):
        found.append({**engine.backward(batches(case, 0, 1), aim), **engine.update()})
    return engine, found


@pytest.mark.parametrize("loss", ["dpo", "ipo", "reward_model"])
def test_training_lowers_the_loss_on_its_batch(tmp_path: Path, loss: str) -> None:
    case = Case(loss)
    make_model(tmp_path, case.head)
    engine, found = trained(tmp_path / case.head, case, 12)
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    assert found[-1]["accuracy"] >= found[0]["accuracy"] and found[-1]["accuracy"] > 0.8
    assert found[-1]["margin"] > found[0]["margin"]
    engine.close()


def test_a_reward_head_starts_from_zeros_and_is_saved_as_a_classifier(tmp_path: Path) -> None:
    """From a language model; what is saved gives the same numbers in plain transformers, and loads again."""
    start = tiny_model(tmp_path / "lm", dtype="float64", seed=5)
    with pytest.raises(InputError, match="score"):
        load_model(start, dtype="float64", head="reward")
    case = Case("reward_model")
    fresh = load_model(start, dtype="float64", head="reward", new_head=True)
    rows = batches(case, 0, 1)
    assert all(float(number) == 0.0 for number in infer(fresh, rows, "rewards"))
    engine, found = trained(start, case, 10)
    assert found[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and found[-1]["loss"] < 0.5
    numbers = infer(engine.model, rows, "rewards")
    save_model(engine.model, None, tmp_path / "saved")
    engine.close()
    assert "score.weight" in load_file(tmp_path / "saved" / "model.safetensors")
    again = load_model(tmp_path / "saved", dtype="float64", head="reward")
    assert all(map(torch.equal, infer(again, rows, "rewards"), numbers))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    plain.config.pad_token_id = None
    tokens = [t for row in rows for t in row.fields["tokens"].split(row.lengths.tolist())]
    for ids, number in zip(tokens, numbers, strict=True):
        with torch.no_grad():
            assert plain(ids[None]).logits.item() == pytest.approx(float(number), abs=1e-5)


def test_scores_are_the_number_at_the_last_token_of_each_sample(tmp_path: Path) -> None:
    case = Case("reward_model")
    make_model(tmp_path, "reward")
    model = load_model(tmp_path / "reward", dtype="float64", head="reward")
    rows, seen = batches(case, 0, 1), []

    def loss(scores: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, group_ids, chosen):
        seen.append((scores.detach().clone(), mask, lengths))
        return reward_model(scores, mask, lengths, group_ids, chosen)

    engine = TrainEngine(model, OptimizerSpec())
    aim = objective(case)
    engine.backward(rows, type(aim)(loss, aim.reads, {}, normalise="sequence", extents=aim.extents))
    engine.close()
    expected = infer(model, rows, "rewards")
    given = [part for scores, _, lengths in seen for part in scores.split(lengths.tolist())]
    for scores, number in zip(given, expected, strict=True):
        torch.testing.assert_close(
            scores, number.expand(len(scores)).to(scores.dtype), rtol=1e-12, atol=1e-12
        )
    for (_, mask, _), row in zip(seen, rows, strict=True):
        assert mask.dtype == torch.bool and torch.equal(mask, row.fields["loss_mask"] & (row.positions > 0))


def test_the_reference_has_the_reported_loss(tmp_path: Path) -> None:
    """Of one sequence after another: log 2 of scores that are all equal."""
    make_model(tmp_path, "reward")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float64)
    with torch.no_grad():
        model.score.weight.zero_()
    model.save_pretrained(tmp_path / "reward")
    assert float(reference(tmp_path, Case("reward_model"))["loss"]) == pytest.approx(0.69314718, abs=1e-7)
