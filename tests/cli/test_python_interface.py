"""RealFlow from Python, and what importing it and its commands loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from calling import Launched

import realflow
from realflow.graph import load_graph

pytestmark = pytest.mark.usefixtures("model_cache", "launched")


NO_TORCH = """
import sys
from realflow.cli import main
for line in {lines!r}:
    assert main(line.split()) == 0, line
loaded = sorted(name for name in ("torch", "transformers", "zmq", "mpi4py") if name in sys.modules)
assert not loaded, loaded
"""


def test_checking_and_planning_import_no_torch() -> None:
    lines = [
        "check grpo --explain batch",
        "draw grpo -o g.svg",
        "graphs",
        "plan grpo --devices 2 -o p.yaml",
        "explain p.yaml",
        "plan grpo model=small-llama --devices 4 --layout d2t2 --layout train=t2p2:recompute -o cut.yaml",
        "explain cut.yaml",
        "explain cut.yaml --realloc",
        "models",
    ]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH.format(lines=lines)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_importing_realflow_loads_almost_nothing() -> None:
    script = (
        "import realflow, sys; watched = {'yaml', 'torch', 'networkx', 'realflow', 'planner'}; "
        "print(sorted(name for name in sys.modules if name.split('.')[0] in watched))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "['realflow']"


def test_python_interface(launched: Launched) -> None:
    graph = realflow.Graph.load("grpo", ["steps=2"])
    assert (
        graph
        == realflow.load_graph("grpo", ["steps=2"])
        == load_graph(Path(realflow.__file__).parent / "graphs" / "grpo.yaml", ["steps=2"])
    )
    plan = realflow.plan(graph, devices=3, layouts={"rollout": "d2@0-1", "*": "d1@2"})
    assert plan.calls["rollout"].ranks == (0, 1) and plan.calls["train"].ranks == (2,)
    assert realflow.plan("grpo", devices=2, layouts="d2", overrides=["steps=2"]).graph == graph
    cut = realflow.plan(
        "grpo",
        devices=4,
        overrides=["model=small-llama"],
        layouts={"*": "d2t2", "train": "p2@2-3:recompute"},
    )
    assert (str(cut.calls["train"].layout), cut.calls["train"].recompute) == ("d1t1p2", True)
    assert [realloc.destination for realloc in cut.reallocs] == ["rollout"]
    result = realflow.run(plan, name="first", quiet=True)
    assert (result.run_dir, launched.calls) == (Path("runs/first"), [(plan, Path("runs/first"), True)])
    realflow.run("grpo", overrides=["steps=2"], devices=1)
    assert launched.calls[1][0].world_size == 1
    with pytest.raises(realflow.InputError, match="resolved already"):
        realflow.run(plan, devices=2)
    with pytest.raises(realflow.InputError, match="resolved already"):
        realflow.plan(graph, overrides=["steps=3"])
    with pytest.raises(AttributeError):
        realflow.nothing  # noqa: B018
    assert {"Graph", "plan", "run"} <= set(dir(realflow))
