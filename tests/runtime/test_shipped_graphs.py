"""Every graph of verifiable rewards that ships with RealFlow, through mpirun on a tiny model: three steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny import tiny_model

from realflow.api import plan, run
from realflow.graph import shipped_graphs

SMALL = ("steps=3", "dtype=float32", "max_new_tokens=8", "prompts=4", "minibatches=2", "lr=1e-3")
GROUPS = ("samples=4",)
GRAPHS: dict[str, tuple[str, ...]] = {
    "dapo": (*GROUPS, "buffer=8"),  # so that answers of other lengths have other rewards
    "m2po": GROUPS,
    "raft": (*GROUPS, "above=-1"),  # a tiny model solves nothing
    "remax": (),
    "cispo": GROUPS,
    "distill": GROUPS,
    "dr_grpo": GROUPS,
    "gspo": GROUPS,
    "lite_ppo": GROUPS,
    "ppo_critic_free": GROUPS,
    "recipes": (*GROUPS, "probe_every=1", "eval_every=2", "eval_prompts=4", "eval_samples=2"),
    "reinforce_pp": (),
    "rloo": GROUPS,
    "sapo": GROUPS,
}
ELSEWHERE = {"grpo", "grpo_lora", "ppo", "sft", "dpo", "reward_model", "evaluate", "generate"}
"""Graphs that other tests run."""
QUICK = ("dapo", "raft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("start") / "model", seed=3)


def test_none_is_left_out() -> None:
    assert set(shipped_graphs()) == GRAPHS.keys() | ELSEWHERE


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in GRAPHS]
)
def test_it_runs_three_steps(tmp_path: Path, model: Path, name: str) -> None:
    own = (f"teacher={model}",) if name == "distill" else ()
    overrides = [f"model={model}", *SMALL, *GRAPHS[name], *own]
    made = plan(name, devices=1, layouts="d1", overrides=overrides)
    rows = run(made, run_dir=tmp_path / "run", quiet=True).metrics
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(row["actor/loss"]) for row in rows)
    assert (tmp_path / "run" / "checkpoints" / "step-000003" / "actor" / "config.json").is_file()
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 1, 2}
    if name == "dapo":
        assert all(row["refill/kept"] <= 4 for row in rows)
    if name in ("remax", "raft"):
        assert all(sample["rewards"] in (0.0, 1.0) for sample in samples)


@pytest.mark.full
def test_reinforce_pp_with_a_baseline(tmp_path: Path, model: Path) -> None:
    overrides = [f"model={model}", *SMALL, *GROUPS, "credit=reinforce_pp_baseline"]
    made = plan("reinforce_pp", devices=1, layouts="d1", overrides=overrides)
    rows = run(made, run_dir=tmp_path / "run", quiet=True).metrics
    assert len(rows) == 3 and all(math.isfinite(row["actor/loss"]) for row in rows)
