"""Runs that record their peaks of memory, against what their plans promise: estimate and certificate."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from realflow.models.paths import is_model, models_dir

STUDY = Path(__file__).resolve().parents[2] / "experiments" / "memory" / "measure.py"
FEW = ["steps=1", "prompts=4", "samples=4", "max_new_tokens=32"]
SMOLLM2 = "smollm2-135m-instruct"


ALONE = ("d1", "d1-recompute", "d1-offload")
TOGETHER = ("d2", "t2-sequence", "p2", "p2-zero-bubble", "moved")


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_study", STUDY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def check(rows: list, ranks: int) -> None:
    assert [row.rank for row in rows] == list(range(ranks))
    for row in rows:
        assert 0.9 <= row.estimate / row.peak <= 1.1, str(row)
        assert row.certificate >= row.peak, str(row)


@pytest.mark.parametrize(
    "layout",
    [
        "t2",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in (
                "d1",
                "d1-recompute",
                "d1-offload",
                "d2",
                "t2-sequence",
                "p2",
                "p2-zero-bubble",
                "moved",
            )
        ),
    ],
)
def test_runs_take_what_their_plans_promise(study: ModuleType, tmp_path: Path, layout: str) -> None:
    """Each rank's peak: near the estimate for the lengths that came, and under the certificate."""
    model = study.make_model(tmp_path / "model", study.SIZES["tiny"])
    rows = study.measure(layout, model, study.LAYOUTS[layout], FEW, tmp_path / "run")
    check(rows, 1 if layout.startswith("d1") else 2)


@pytest.mark.full
@pytest.mark.real_model
@pytest.mark.parametrize("layout", ["d1", "p2", "t2"])
def test_smollm2_takes_what_its_plan_promises(study: ModuleType, tmp_path: Path, layout: str) -> None:
    if not is_model(models_dir() / SMOLLM2):
        pytest.skip(f"{SMOLLM2} is not in the cache")
    rows = study.measure(layout, models_dir() / SMOLLM2, study.LAYOUTS[layout], FEW, tmp_path / "run")
    check(rows, 1 if layout == "d1" else 2)
