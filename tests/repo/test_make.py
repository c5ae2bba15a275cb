"""What the Makefile's targets run, asked with `make -n`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPREAD = "python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "


def planned(target: str, *variables: str) -> list[str]:
    """The commands that `make target` would run, one a line."""
    make = shutil.which("make")
    assert make is not None, "the README promises that make is all that is needed"
    # Under `make test` the whole environment would make it a sub-make with the outer one's variables.
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [make, "-n", target, *variables],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return done.stdout.splitlines()


def test_make_test_lints_then_tests() -> None:
    lines = planned("test", "ARGS=-x")
    tools = [line.split("/")[-1] for line in lines if "/bin/" in line]
    wanted = ["ruff check .", "ruff format --check .", "mypy", "lint-imports", SPREAD + "-x"]
    assert [tool for tool in tools if tool in wanted] == wanted


def test_make_test_full_runs_both_kinds() -> None:
    assert any(line.endswith('-m pytest -q -m "full or not full" ') for line in planned("test-full"))


def test_make_demo_fetches_the_model_and_runs_the_demo() -> None:
    lines = [line for line in planned("demo", "ARGS=--steps 2") if "/bin/" in line]
    assert lines[-2].endswith("realflow models fetch smollm2-135m-instruct")
    assert lines[-1].endswith("python experiments/demo/demo.py --steps 2")
    assert (ROOT / "experiments/demo/demo.py").is_file()


@pytest.mark.parametrize("target", ["demo", "test"])
def test_a_new_virtual_environment_is_set_up_first(target: str, tmp_path: Path) -> None:
    lines = planned(target, f"VENV={tmp_path / 'new'}")
    assert lines[0] == f"scripts/setup.sh {tmp_path / 'new'}"


def test_ci_runs_make_test() -> None:
    assert (ROOT / ".ci/run").read_text("utf-8").splitlines()[-1] == "make test"
