"""On-policy distillation from a larger teacher: it teaches, also beside RL, and both terms have gradients."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SPECIALS, tiny_model
from transformers import AutoModelForCausalLM

from realflow.algorithms.losses import distill
from realflow.api import plan, run
from realflow.data.batch import Batch, pack
from realflow.engines.generate import NativeEngine
from realflow.engines.infer import infer, prepare
from realflow.engines.objective import Objective
from realflow.engines.samples import Finished, Prompt
from realflow.engines.train import TrainEngine
from realflow.graph import Graph, find_graph, graph_to_mapping, load_graph
from realflow.graph.builtins import BUILTINS
from realflow.graph.types import OptimizerSpec, Sampling
from realflow.models.causal import CausalModel, load_model

LARGER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8}
NEW = 8
DECL = BUILTINS["losses.distill"]


@pytest.fixture
def student(tmp_path: Path) -> CausalModel:
    return load_model(tiny_model(tmp_path / "student", dtype="float64", seed=3), dtype="float64")


@pytest.fixture
def teacher(tmp_path: Path) -> CausalModel:
    """Twice as wide and twice as deep, with the same tokenizer."""
    return load_model(tiny_model(tmp_path / "teacher", dtype="float64", seed=9, **LARGER), dtype="float64")


def draw(model: CausalModel, first: int, prompts: int = 16) -> list[Finished]:
    """Two answers of the model to each of `prompts` prompts of three tokens."""
    engine = NativeEngine(
        model, Sampling(NEW), slots=32, max_length=3 + NEW, seed=1,
        eos_ids=(SPECIALS.index("<|im_end|>"),), tokenizer=None,
    )  # fmt: skip
    groups = range(first, first + prompts)
    engine.feed([Prompt(g, (2 * g, 2 * g + 1), (4 + g % 90, 5 + g * 7 % 90, 9)) for g in groups])
    found: list[Finished] = []
    while engine.busy:
        found += engine.step()
    return sorted(found, key=lambda one: one.sample_id)


def batch(rows: list[Finished], **fields: list[torch.Tensor]) -> Batch:
    columns: dict[str, list[torch.Tensor]] = {
        "tokens": [row.tokens for row in rows],
        "loss_mask": [row.loss_mask for row in rows],
        "old_logprobs": [row.logprobs for row in rows],
        **fields,
    }
    dtypes = {name: {"tokens": "int", "loss_mask": "bool"}.get(name, "float") for name in columns}
    ids, lengths = [row.sample_id for row in rows], [len(row.tokens) for row in rows]
    return pack(ids, lengths, columns, dict.fromkeys(columns, "token"), dtypes)


def objective(fields: Mapping[str, Any], **options: float) -> Objective:
    reads = {use.name: use.name for use in DECL.reads if use.name in fields}
    extents = {use.name: use.extent for use in DECL.reads}
    return Objective(distill, reads, {**DECL.options, **options}, extents=extents)


@torch.no_grad()
def distance(student: CausalModel, teacher: CausalModel) -> float:
    """The exact reverse KL of the next token over the whole vocabulary, in states that the student comes to
    on prompts it was not trained on."""
    rows = draw(student, first=5000)
    packed = batch(rows)
    mine = student.head(student.run(prepare(student, packed), None)).log_softmax(-1)
    larger = AutoModelForCausalLM.from_pretrained(teacher.source, dtype=torch.float64)
    theirs = torch.cat([larger(row.tokens[None]).logits[0] for row in rows]).log_softmax(-1)
    chosen = packed.fields["loss_mask"].roll(-1)  # the state before each token of a response
    return float((mine.exp() * (mine - theirs)).sum(-1)[chosen].mean())


def train(student: CausalModel, teacher: CausalModel, steps: int, **options: float) -> list[float]:
    """On-policy steps; the estimates of the reverse KL that the loss reports."""
    engine, found = TrainEngine(student, OptimizerSpec(lr=5e-3)), []
    for step in range(steps):
        rows = draw(student, first=16 * step)
        own = batch(rows)
        fields = {"teacher_logprobs": infer(teacher, [own], "logprobs")}
        aim = objective({**own.fields, **fields}, **options)
        found.append(engine.backward([batch(rows, **fields)], aim)["reverse_kl"])
        engine.update()
    engine.close()
    return found


def test_a_larger_teacher_lowers_the_reverse_kl(student: CausalModel, teacher: CausalModel) -> None:
    assert teacher.flat.storage.numel() > 5 * student.flat.storage.numel()
    before = distance(student, teacher)
    estimates = train(student, teacher, 20)
    after = distance(student, teacher)
    assert after < 0.8 * before
    assert sum(estimates[-5:]) < 0.85 * sum(estimates[:5])
    # What the loss reports is the KL: in the mean over draws, which a few hundred tokens give roughly.
    assert estimates[0] == pytest.approx(before, rel=0.3)


def test_without_weight_the_teacher_changes_nothing(student: CausalModel, teacher: CausalModel) -> None:
    """The control: the same steps with `coef` 0."""
    before = distance(student, teacher)
    train(student, teacher, 3, coef=0.0)
    assert distance(student, teacher) == pytest.approx(before, rel=1e-12)


def gradient(student: CausalModel, rows: Batch, **options: float) -> torch.Tensor:
    engine = TrainEngine(student, OptimizerSpec(clip_norm=0))
    engine.backward([rows], objective(rows.fields, **options))
    found = torch.cat([part.flatten().clone() for part in engine.gradients()])
    engine.close()
    return found


def test_joined_with_rl_both_terms_reach_the_weights(student: CausalModel, teacher: CausalModel) -> None:
    """The gradient of the sum is the sum of both, and neither is part of the other."""
    rows = draw(student, first=0)
    generator = torch.Generator().manual_seed(2)
    teaching = {"teacher_logprobs": infer(teacher, [batch(rows)], "logprobs")}
    rewarded = [torch.randn(1, generator=generator).double().expand(len(row.tokens)) for row in rows]
    joined = batch(rows, **teaching, advantages=rewarded)
    both, rl = gradient(student, joined, coef=0.5), gradient(student, joined, coef=0.0)
    taught = gradient(student, batch(rows, **teaching), coef=0.5)
    assert (both - rl - taught).norm() <= 1e-10 * both.norm()
    for one, other in ((both, rl), (both, taught), (rl, taught)):
        assert (one - other).norm() > 0.1 * max(one.norm(), other.norm())
    cosine = torch.nn.functional.cosine_similarity(rl, taught, dim=0)
    assert abs(float(cosine)) < 0.9


@pytest.mark.full
@pytest.mark.parametrize("rewards", ["joined", "alone"])
def test_the_graph_learns_from_a_larger_teacher(tmp_path: Path, rewards: str) -> None:
    """Teacher and student on ranks of their own layouts; without credit the distance alone is trained on."""
    model = tiny_model(tmp_path / "student", dtype="float32", seed=3)
    larger = tiny_model(tmp_path / "teacher", dtype="float32", seed=9, **LARGER)
    settings = {
        "model": model, "teacher": larger, "dtype": "float32", "prompts": 8, "samples": 4, "steps": 20,
        "max_new_tokens": NEW, "lr": 5e-3, "coef": 1.0,
    }  # fmt: skip
    layouts = {"rollout": "d2", "teach": "t2", "train": "d2"}
    made = plan(graph(settings, credit=rewards == "joined"), devices=2, layouts=layouts)
    rows = run(made, run_dir=tmp_path / "run", quiet=True).metrics
    kl = [row["actor/reverse_kl"] for row in rows]
    assert sum(kl[-4:]) < 0.8 * sum(kl[:4])
    assert ("actor/pg_clipfrac" in rows[0]) == (rewards == "joined")
    saved = tmp_path / "run" / "checkpoints" / "step-000020" / "actor" / "config.json"
    assert json.loads(saved.read_text())["hidden_size"] == 32


def graph(settings: Mapping[str, Any], *, credit: bool) -> Graph:
    """The shipped graph, with RL and without."""
    found = load_graph(find_graph("distill"), [f"{name}={value}" for name, value in settings.items()])
    if credit:
        return found
    mapping = graph_to_mapping(found)
    del mapping["calls"]["credit"]
    return load_graph(mapping)
