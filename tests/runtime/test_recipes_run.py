"""The graph `recipes` on the small real model in bfloat16: each of its recipes is seen in metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import pytest

from realflow.api import run
from realflow.observe.metrics import read_metrics

SMALL = ("steps=2", "prompts=2", "samples=4", "minibatches=1", "eval_prompts=2", "eval_samples=2")
SET = ("importance=masked", "low=0.98", "high=1.02", "entropy_coef=0.01", "normalise=sequence")
RHYTHM = ("max_new_tokens=[[1, 6], [null, 12]]", "probe_every=2", "eval_every=2")


@pytest.mark.full
def test_every_recipe_is_seen(tmp_path: Path) -> None:
    """Of ratios within 2 % of 1 some tokens have one, and the others weigh 0. The noise floor may be 0: where
    sums are done in one order whatever the batch, as on most CPUs."""
    run("recipes", overrides=[*SMALL, *SET, *RHYTHM], devices=1, run_dir=tmp_path / "run", quiet=True)
    first, second = read_metrics(tmp_path / "run")
    assert first["response_length/max"] <= 6 < second["response_length/max"] <= 12
    assert not any(name.startswith(("mismatch/noise", "eval/")) for name in first)
    assert second["eval/missing"] == 0
    assert (tmp_path / "run" / "checkpoints" / "best" / "best.json").is_file()
    noise = {name: second[f"mismatch/noise/{name}"] for name in ("abs_mean", "q99", "frac_outside")}
    assert all(0 <= value < 1 for value in noise.values())
    for row in (first, second):
        assert 0 < row["mismatch/abs_mean"] < row["mismatch/q99"] < 1
        assert 0 < row["mismatch/frac_outside"] < 1
        assert row["weights/weights/mean"] == pytest.approx(1 - row["mismatch/frac_outside"], abs=0.02)
        assert row["actor/entropy"] > 0
