"""Every broken graph and plan of the tables, and bytes that are no text, through the real commands:
exit code 2, problems and nothing else on stderr, no torch, no process started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

SCRIPT = """
import contextlib, io, json, pathlib, sys
import psutil
tests, folder = map(pathlib.Path, sys.argv[1:])
sys.path[:0] = [str(tests), str(tests / "graph"), str(tests / "plan")]
import test_graph_broken as graphs
import test_planfile_broken as plans
from realflow.cli import main
from realflow.planfile import plan_to_yaml

files = {}
for number, (old, new, part, _) in enumerate(graphs.BROKEN):
    if part is not None:
        files[f"graph-{number}.yaml"] = ("check", graphs.GOOD.replace(old, new, 1).encode())
for number, (old, new, _, _) in enumerate(plans.BROKEN.values()):
    text = new if old is None else plan_to_yaml(plans.plain_plan()).replace(old, new, 1)
    files[f"plan-{number}.yaml"] = ("explain", text.encode())
files["latin.yaml"] = ("check", graphs.GOOD.encode().replace(b"some-model", b"some-\\xe9", 1))
files["nested.yaml"] = ("check", b"[" * 10_000_000)
files["nested-plan.yaml"] = ("run", b"format: 1\\ncluster: " + b"{a: " * 2_000_000)
files["bytes.yaml"] = ("check", bytes(range(256)))

out = {}
for name, (command, data) in files.items():
    path = folder / name
    path.write_bytes(data)
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = main([command, str(path)])
    out[name] = (code, told.getvalue(), "torch" in sys.modules, len(psutil.Process().children()))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, bool, int]]:
    command = [sys.executable, "-c", SCRIPT, str(TESTS), str(tmp_path_factory.mktemp("broken"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, tuple[int, str, bool, int]] = json.loads(done.stdout)
    return found


def test_there_are_enough(told: dict[str, tuple[int, str, bool, int]]) -> None:
    assert sum(name.startswith("graph") for name in told) >= 40
    assert sum(name.startswith("plan") for name in told) >= 30


def test_each_is_refused_with_what_is_wrong(told: dict[str, tuple[int, str, bool, int]]) -> None:
    for name, (code, text, torch, children) in told.items():
        assert code == 2, (name, text)
        assert 1 <= len(text.splitlines()) <= 8, (name, text)
        assert name in text, (name, text)
        assert "Traceback" not in text, name
        assert len(text) < 4000, name
        assert not torch, name
        assert children == 0, name


def test_as_a_command(tmp_path: Path) -> None:
    """The process itself: its exit code, and no traceback."""
    path = tmp_path / "graph.yaml"
    path.write_bytes(b"[" * 10_000_000)
    for command in ("check", "plan", "run"):
        done = subprocess.run(
            [sys.executable, "-m", "realflow", command, str(path)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert "graph.yaml" in done.stderr
        assert "Traceback" not in done.stderr
