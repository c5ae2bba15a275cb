"""Losses of groups and of sequences on several ranks, their gradients compared with plain Hugging Face.

Used by `test_pairs`: every rank takes its part of one minibatch as a run does, and writes what it found.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from grid_ranks import Comparison, compare_gradient
from grid_reference import exact_norms
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from realflow.algorithms import losses
from realflow.data.balance import micro_batches
from realflow.data.batch import Batch, pack
from realflow.engines.objective import Objective
from realflow.engines.train import TrainEngine
from realflow.errors import InputError
from realflow.graph.builtins import BUILTINS
from realflow.graph.types import Normalise, OptimizerSpec
from realflow.layout import DeviceMesh, Layout
from realflow.models.causal import load_model
from realflow.models.place import Place, groups_of
from realflow.runtime.assign import divide

GROUPS, RANKS = 7, 2
EXTENTS = {"tokens": "token", "loss_mask": "token", "logprobs": "token", "ref_logprobs": "token"}
EXTENTS |= {"group_id": "sample", "chosen": "sample", "advantages": "sample"}
DTYPES = {"tokens": "int", "loss_mask": "bool", "logprobs": "float", "ref_logprobs": "float"}
DTYPES |= {"group_id": "int", "chosen": "bool", "advantages": "float"}


@dataclass(frozen=True)
class Case:
    """A loss, how it is normalised, how many tokens a micro-batch has, and the layout; `mistake` is one
    built in."""

    loss: str
    normalise: Normalise = "sequence"
    budget: int = 20
    layout: str = "d2"
    mistake: str = ""

    @property
    def head(self) -> str:
        return "reward" if self.loss == "reward_model" else "lm"

    @property
    def name(self) -> str:
        how = self.normalise if isinstance(self.normalise, str) else "constant"
        return "-".join(filter(None, [self.loss, how, str(self.budget), self.layout, self.mistake]))


CASES = [
    Case("dpo"),
    Case("dpo", budget=1000),
    Case("ipo", budget=1),
    Case("reward_model"),
    Case("reward_model", layout="t2"),
    Case("reward_model", layout="p2"),
    Case("gspo"),
    Case("ppo_clip", {"constant": 32}),
]
CONTROLS = [Case("dpo", "token", mistake="token"), Case("dpo", mistake="divided")]


def samples() -> list[dict[str, Any]]:
    """Two samples for each group, of different lengths; group ids are not their places."""
    generator = torch.Generator().manual_seed(11)

    def draw(low: int, high: int, count: int = 1) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    rows = []
    for group in range(GROUPS):
        for chosen in (True, False):
            length, prompt = int(draw(4, 16)), int(draw(1, 4))
            noise = torch.rand(2, length, generator=generator, dtype=torch.float64)
            row = {"tokens": draw(4, 100, length), "loss_mask": torch.arange(length) >= prompt}
            row |= {"logprobs": -6 * noise[0], "ref_logprobs": -6 * noise[1], "chosen": chosen}
            advantage = float(torch.randn(1, generator=generator))
            rows.append({**row, "group_id": 3 * group + 1, "advantages": advantage})
    return rows


def batches(case: Case, replica: int, replicas: int) -> list[Batch]:
    """A replica's micro-batches, divided as a run does it."""
    rows = samples()
    whole = BUILTINS[f"losses.{case.loss}"].scope == "group" and case.mistake != "divided"
    groups = [row["group_id"] for row in rows]
    lengths = {place: len(row["tokens"]) for place, row in enumerate(rows)}
    mine = divide(range(len(rows)), lengths, replicas, float, groups if whole else None)[replica]
    of_mine = [groups[i] for i in mine] if whole else None
    parts = [
        [mine[i] for i in part] for part in micro_batches([lengths[i] for i in mine], case.budget, of_mine)
    ]
    return [
        pack(
            part,
            [lengths[i] for i in part],
            {name: [rows[i][name] for i in part] for name in EXTENTS},
            EXTENTS,
            DTYPES,
        )
        for part in parts
    ]


def objective(case: Case) -> Objective:
    """The loss as a train call of a graph gives it."""
    decl = BUILTINS[f"losses.{case.loss}"]
    reads = {use.name: use.field for use in decl.reads if use.field in EXTENTS and not use.optional}
    options = {**decl.options, **({"clip_low": 0.2, "clip_high": 0.3} if "clip_low" in decl.options else {})}
    return Objective(
        getattr(losses, case.loss),
        reads,
        options,
        normalise=case.normalise,
        extents={use.name: use.extent for use in decl.reads},
    )


# ---------------------------------------------------------------- the reference


def make_model(folder: Path, head: str) -> None:
    """A tiny model of each head."""
    if head == "lm":
        tiny_model(folder / head, dtype="float64", seed=2)
        return
    torch.manual_seed(2)
    config = tiny_config(num_labels=1)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float64).save_pretrained(folder / head)


def reference(folder: Path, case: Case) -> dict[str, torch.Tensor]:
    """The gradient by plain Hugging Face, a sequence at a time, from the formulas of the papers."""
    auto = AutoModelForCausalLM if case.head == "lm" else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder / case.head, dtype=torch.float64)
    exact_norms(model)
    rows = samples()
    told = [_numbers(model, case, row) for row in rows]
    if BUILTINS[f"losses.{case.loss}"].scope == "group":
        loss = torch.stack(
            [_pair(case, rows[i : i + 2], told[i : i + 2]) for i in range(0, len(rows), 2)]
        ).mean()
    elif case.loss == "gspo":
        loss = torch.stack([_gspo(row, now) for row, now in zip(rows, told, strict=True)]).mean()
    else:
        sums = [_ppo(row, now).sum() for row, now in zip(rows, told, strict=True)]
        loss = torch.stack(sums).sum() / (32 * len(rows))
    loss.backward()
    found = {f"g0/{name}": p.grad.clone() for name, p in model.named_parameters()}
    return {**found, "loss": loss.detach()}


def _numbers(model: torch.nn.Module, case: Case, row: dict[str, Any]) -> torch.Tensor:
    """Log probabilities of the masked tokens, or the score."""
    tokens = row["tokens"]
    if case.head == "reward":
        return model(tokens[None]).logits[0, 0]
    log_p = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, tokens[1:, None])[:, 0][row["loss_mask"][1:]]


def _kept(row: dict[str, Any], name: str) -> torch.Tensor:
    return row[name][row["loss_mask"]]


def _pair(case: Case, rows: list[dict[str, Any]], told: list[torch.Tensor]) -> torch.Tensor:
    if case.loss == "reward_model":
        return torch.log1p(torch.exp(told[1] - told[0]))
    ratios = [now - _kept(row, "ref_logprobs") for row, now in zip(rows, told, strict=True)]
    if case.loss == "ipo":
        return (ratios[0].mean() - ratios[1].mean() - 1 / 0.2) ** 2
    return torch.log1p(torch.exp(-0.1 * (ratios[0].sum() - ratios[1].sum())))


def _clipped(ratio: torch.Tensor, advantage: float) -> torch.Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)


def _gspo(row: dict[str, Any], now: torch.Tensor) -> torch.Tensor:
    return _clipped((now - _kept(row, "logprobs")).mean().exp(), row["advantages"])


def _ppo(row: dict[str, Any], now: torch.Tensor) -> torch.Tensor:
    return _clipped((now - _kept(row, "logprobs")).exp(), row["advantages"])


# ---------------------------------------------------------------- ranks


def worker(rank: int, folder: Path, ranks: int) -> None:
    """One rank: all cases, what it found as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    layouts = {case.layout for case in CASES}
    meshes = {text: DeviceMesh(tuple(range(ranks)), Layout.parse(text)) for text in sorted(layouts)}
    needed = sorted(set().union(*(groups_of(mesh) for mesh in meshes.values())))
    groups = {members: dist.new_group(list(members)) for members in needed}
    for case in (*CASES, *CONTROLS):
        result = run_case(folder, case, Place.of(meshes[case.layout], rank, groups))
        (folder / f"{case.name}.{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


def run_case(folder: Path, case: Case, place: Place) -> dict[str, Any]:
    """Gradients and metrics of one minibatch; of a case in which a loss refuses its batch, what it says."""
    expected = reference(folder, case)
    model = load_model(folder / case.head, dtype="float64", place=place, head=case.head)
    engine = TrainEngine(model, OptimizerSpec())
    mine = batches(case, place.dp.index, place.dp.size)
    try:
        if case.mistake == "divided":  # alone, so that no other rank waits
            return {"error": _alone(folder, case, mine)}
        metrics = engine.backward(mine, objective(case))
        found = Comparison(expected)
        compare_gradient(engine, "g0", found)
        wanted = float(expected["loss"])
        return {"found": found.found, "metrics": metrics, "loss": wanted, "batches": len(mine)}
    finally:
        engine.close()


def _alone(folder: Path, case: Case, mine: list[Batch]) -> str:
    engine = TrainEngine(load_model(folder / case.head, dtype="float64"), OptimizerSpec())
    try:
        engine.backward(mine, objective(case))
        return ""
    except InputError as error:
        return str(error)
    finally:
        engine.close()


def launch(folder: Path, ranks: int = RANKS) -> Path:
    """Run all cases on `ranks` processes; what they found lies in `folder`."""
    for head in ("lm", "reward"):
        make_model(folder, head)
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(worker, (folder, ranks), nprocs=ranks)
    return folder
