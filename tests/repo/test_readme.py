"""The README's commands and its Python work as they stand there.

`make demo` is run as the script behind it, with two small steps; `make test` is what runs this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAKE = {
    "make demo": f"'{sys.executable}' '{ROOT}/experiments/demo/demo.py' --steps 2 prompts=2 samples=2",
    "make test": "true",
}
TIMEOUT = 500


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block."""
    return BLOCK.findall(text)


def environment() -> dict[str, str]:
    """This Python's commands first on the path, as after `source .venv/bin/activate`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # The README says that the bare mpirun wants these as root; a person sets them in the shell.
    as_root = (
        {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if not os.getuid() else {}
    )
    return {**os.environ, **as_root, "PATH": path, "COLUMNS": "100"}


def commands() -> list[str]:
    """The bash blocks, `make` mapped to what it runs."""
    found = [code for language, code in blocks((ROOT / "README.md").read_text("utf-8")) if language == "bash"]
    return [
        "\n".join(
            MAKE.get(line.strip(), line) for line in code.splitlines() if not line.startswith("source ")
        )
        for code in found
    ]


def must_succeed(arguments: list[str], folder: Path) -> str:
    """Run; show both outputs when it fails."""
    done = subprocess.run(
        arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_every_make_target_is_known() -> None:
    """A new `make ...` in a block needs an entry in MAKE, or it would run as itself."""
    text = (ROOT / "README.md").read_text("utf-8")
    lines = [line.strip() for _, code in blocks(text) for line in code.splitlines()]
    assert {line for line in lines if line.startswith("make ")} == set(MAKE)


@pytest.mark.real_model
@pytest.mark.timeout(TIMEOUT + 60)
def test_bash_blocks(real_model: Path, tmp_path: Path) -> None:
    """In one empty folder, in the README's order."""
    for code in commands():
        must_succeed(["bash", "-euo", "pipefail", "-c", code], tmp_path)
    assert (tmp_path / "grpo.svg").exists()
    for run in ("first", "second"):
        assert (tmp_path / "runs" / run / "metrics.jsonl").exists()
    assert (tmp_path / "runs" / "first" / "report.html").exists()


@pytest.mark.real_model
@pytest.mark.timeout(TIMEOUT + 60)
def test_python_blocks(real_model: Path, tmp_path: Path) -> None:
    sources = [
        code for language, code in blocks((ROOT / "README.md").read_text("utf-8")) if language == "python"
    ]
    assert sources
    for source in sources:
        assert "from-python" in must_succeed([sys.executable, "-c", source], tmp_path)
