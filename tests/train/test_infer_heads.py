"""What value and reward models say, on one rank; layouts are in `test_grid`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from grid_reference import exact_norms
from tiny import tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification

from realflow.algorithms.terms import LossTerms
from realflow.data.batch import Batch, pack
from realflow.engines.infer import infer
from realflow.engines.train import TrainEngine
from realflow.errors import InputError
from realflow.graph.types import OptimizerSpec
from realflow.models.causal import load_model

LENGTHS = (7, 1, 12, 5)


def batch(lengths: tuple[int, ...], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(4, 100, (length,), generator=generator) for length in lengths]
    mask = [torch.arange(length) >= 2 for length in lengths]
    extents, dtypes = {"tokens": "token", "loss_mask": "token"}, {"tokens": "int", "loss_mask": "bool"}
    return pack(range(len(lengths)), lengths, {"tokens": tokens, "loss_mask": mask}, extents, dtypes)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("qwen3")
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    return folder


def test_values_and_rewards_equal_hugging_face(classifier: Path) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float64)
    exact_norms(plain)
    batches = [batch(LENGTHS, 0), batch((3, 9), 1)]
    tokens = [t for b in batches for t in b.fields["tokens"].split(b.lengths.tolist())]
    reward = load_model(classifier, dtype="float64", head="reward")
    value = load_model(classifier, dtype="float64", head="value")
    rewards, values = infer(reward, batches, "rewards"), infer(value, batches, "values")
    assert len(rewards) == len(values) == len(tokens)
    for number, every, ids in zip(rewards, values, tokens, strict=True):
        with torch.no_grad():
            states = plain.score(plain.model(ids[None]).last_hidden_state)[0, :, 0]
            assert plain(ids[None]).logits.item() == pytest.approx(number.item(), abs=1e-10)
        torch.testing.assert_close(every, states, rtol=0, atol=1e-10)  # also where loss_mask is false
        assert number.shape == () and every.shape == (len(ids),) and not every.requires_grad
        assert number.item() == pytest.approx(every[-1].item(), rel=1e-12)


def test_outputs_that_a_head_does_not_have_are_refused(classifier: Path, tmp_path: Path) -> None:
    reward = load_model(classifier, dtype="float32", head="reward")
    with pytest.raises(InputError, match="head 'reward' gives rewards or values, not 'logprobs'"):
        infer(reward, [batch(LENGTHS, 0)], "logprobs")
    language = load_model(tiny_model(tmp_path), dtype="float32")
    with pytest.raises(InputError, match="head 'lm' gives logprobs, not 'values'"):
        infer(language, [batch(LENGTHS, 0)], "values")
    assert infer(language, [], "logprobs") == []


def test_a_value_loss_reads_values_at_every_token(classifier: Path) -> None:
    """Entry i is of the state after tokens[: i + 1], so that a loss at i uses entry i - 1, also where
    that is a prompt's."""
    model = load_model(classifier, dtype="float64", head="value")
    one = batch(LENGTHS, 0)
    expected = torch.cat(infer(model, [one], "values"))
    seen = []

    def loss(values: torch.Tensor, loss_mask: torch.Tensor) -> LossTerms:
        seen.append(values.detach().clone())
        return LossTerms((values.roll(1) - 1).square())

    engine = TrainEngine(model, OptimizerSpec(lr=1e-2))
    metrics = [engine.step([one], loss, reads={"loss_mask": "loss_mask"}, prefix="critic") for _ in range(8)]
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-12)
    assert sorted(metrics[0]) == ["critic/grad_norm", "critic/loss", "critic/lr"]
    assert metrics[-1]["critic/loss"] < metrics[0]["critic/loss"] / 2
