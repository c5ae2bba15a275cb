"""One optimizer step of the engine with every loss of a policy, and the losses that teach by example."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from realflow.algorithms import losses
from realflow.data.batch import Batch, pack
from realflow.engines.infer import infer
from realflow.engines.objective import Objective
from realflow.engines.train import TrainEngine
from realflow.graph.builtins import BUILTINS
from realflow.graph.types import OptimizerSpec
from realflow.models.causal import CausalModel, load_model

LENGTHS = (9, 14, 6, 11)
POLICY = ("ppo_clip", "gspo", "cispo", "sapo", "m2po", "decoupled_ppo", "distill")
FIELDS = {
    "old_logprobs": "now",
    "prox_logprobs": "now",
    "behaviour_logprobs": "now",
    "teacher_logprobs": "now",
}
"""Where the policy has not changed since it drew the samples, all of these are its own."""


def samples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in LENGTHS:
        mask = torch.arange(length) >= 3
        mask[5] = False
        advantage = float(torch.randn(1, generator=generator))
        rows.append(
            {"tokens": torch.randint(4, 90, (length,), generator=generator), "loss_mask": mask}
            | {"advantages": advantage}
        )
    return rows


def batch(rows: list[dict[str, Any]], **fields: list[torch.Tensor]) -> Batch:
    names = ["tokens", "loss_mask", "advantages"]
    extents = {
        "tokens": "token",
        "loss_mask": "token",
        "advantages": "sample",
        **dict.fromkeys(fields, "token"),
    }
    dtypes = {"tokens": "int", "loss_mask": "bool", "advantages": "float", **dict.fromkeys(fields, "float")}
    values = {name: [row[name] for row in rows] for name in names}
    return pack(range(len(rows)), [len(row["tokens"]) for row in rows], {**values, **fields}, extents, dtypes)


def objective(name: str, fields: Mapping[str, str]) -> Objective:
    """A built-in loss as a train call has it, at its own way to normalise."""
    decl = BUILTINS[f"losses.{name}"]
    reads = {use.name: fields.get(use.name, use.name) for use in decl.reads if not use.optional}
    if name == "distill" and "advantages" in fields.values():
        reads |= {"advantages": "advantages", "old_logprobs": "now"}
    return Objective(
        getattr(losses, name), reads, dict(decl.options), normalise=decl.normalise,
        extents={use.name: use.extent for use in decl.reads},
    )  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> CausalModel:
    return load_model(tiny_model(tmp_path / "model", dtype="float64", seed=3), dtype="float64")


def logprobs(model: CausalModel) -> list[torch.Tensor]:
    return infer(model, [batch(samples())], "logprobs")


def gain(model: CausalModel) -> float:
    """Sum of mask x advantage x logprob."""
    rows = zip(samples(), logprobs(model), strict=True)
    return float(sum((row["advantages"] * found)[row["loss_mask"]].sum() for row, found in rows))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", POLICY)
def test_a_step_makes_better_tokens_likelier(model: CausalModel, name: str, sign: int) -> None:
    """And, as the control, with negated advantages less likely."""
    before, now, rows = gain(model), logprobs(model), samples()
    for row in rows:
        row["advantages"] *= sign
    engine = TrainEngine(model, OptimizerSpec(lr=1e-3))
    parts = [batch(rows[:1], now=now[:1]), batch(rows[1:], now=now[1:])]
    metrics = engine.backward(parts, objective(name, {**FIELDS, "advantages": "advantages"}))
    engine.update()
    engine.close()
    assert metrics["pg_loss"] == pytest.approx(metrics["loss"], rel=1e-9)
    assert sign * (gain(model) - before) > 1e-3


@pytest.mark.parametrize("name", ["sft", "distill"])
def test_training_lowers_the_loss_on_its_batch(model: CausalModel, tmp_path: Path, name: str) -> None:
    teacher = load_model(tiny_model(tmp_path / "teacher", dtype="float64", seed=9), dtype="float64")
    rows = batch(samples(), teacher=logprobs(teacher))
    engine = TrainEngine(model, OptimizerSpec(lr=3e-3))
    aim, found = objective(name, {"teacher_logprobs": "teacher"}), []
    for _ in range(10):
        found.append(engine.backward([rows], aim)["loss"])
        engine.update()
    engine.close()
    assert found[-1] < 0.8 * found[0]


def test_metrics_weigh_as_the_loss_does(model: CausalModel) -> None:
    """By `sequence` a metric is the mean over sequences, else that over tokens: they differ here."""
    rows, now = samples(), logprobs(model)
    values = torch.cat(now)[torch.cat([row["loss_mask"] for row in rows])]
    sequences = torch.stack([found[row["loss_mask"]].mean() for found, row in zip(now, rows, strict=True)])

    def loss(logprobs: torch.Tensor, mask: torch.Tensor) -> Any:
        terms = losses.sft(logprobs, mask)
        return type(terms)(terms.per_token, {"mine": logprobs.detach()})

    engine = TrainEngine(model, OptimizerSpec())
    parts = [batch(rows[:2]), batch(rows[2:])]
    wanted = {"sequence": sequences.mean(), "token": values.mean()}
    for how, mean in wanted.items():
        assert engine.backward(parts, Objective(loss, normalise=how))["mine"] == pytest.approx(float(mean))
    constant = engine.backward(parts, Objective(loss, normalise={"constant": 100}))
    engine.close()
    assert constant["mine"] == pytest.approx(float(values.mean()))
    assert constant["loss"] == pytest.approx(float(-values.sum()) / (100 * len(rows)))
    assert abs(float(wanted["sequence"] - wanted["token"])) > 1e-3
