"""Rooms hold what import-linter cannot see: what is loaded in fact, and purity in submodules."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Loaded by `realflow check`, `plan`, `explain`, and by the master: no torch.
TORCHLESS = [
    "realflow",
    "realflow.cli",
    "realflow.errors",
    "realflow.graph",
    "realflow.layout",
    "realflow.planfile",
    "realflow.models.card",
    "realflow.models.layouts",
    "realflow.models.partition",
    "realflow.models.paths",
    "realflow.observe.metrics",
    "realflow.observe.progress",
    "realflow.observe.report",
    "realflow.observe.trace",
    "realflow.realloc",
    "realflow.realloc.edges",
    "realflow.realloc.plan",
    "realflow.runtime.core",
    "realflow.runtime.master",
    "realflow.runtime.messages",
    "planner",
]
# Pure: neither processes nor sockets, in any submodule, not even inside a function.
PURE = {
    "realflow/algorithms": {"torch.distributed", "zmq", "mpi4py"},
    "realflow/data": {"torch.distributed", "zmq", "mpi4py"},
    "realflow/graph": {"torch", "zmq", "mpi4py", "transformers"},
    "realflow/planfile": {"torch", "zmq", "mpi4py", "transformers"},
    "realflow/realloc/plan.py": {"torch", "zmq", "mpi4py"},
    "realflow/runtime/core.py": {"torch", "zmq", "mpi4py"},
    "realflow/runtime/messages.py": {"torch", "zmq", "mpi4py"},
    "planner": {"torch", "zmq", "mpi4py", "transformers"},
}


def imported_by(source: str) -> set[str]:
    """Every module that a source imports or reaches by attribute (`torch.distributed`), at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
    return names


def forbidden_in(source: str, forbidden: set[str]) -> set[str]:
    """The forbidden modules among them."""
    names = imported_by(source)
    return {bad for bad in forbidden if any(name == bad or name.startswith(f"{bad}.") for name in names)}


def test_the_check_finds_hidden_imports() -> None:
    """The control: imports inside functions and uses by attribute are found."""
    assert forbidden_in("def f():\n    import torch.distributed as d\n", {"torch"}) == {"torch"}
    assert forbidden_in("import torch\ntorch.distributed.barrier()", {"torch.distributed"})
    assert not forbidden_in("import torch\nfrom realflow.torchlike import x", {"torch.distributed", "zmq"})


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms(room: str) -> None:
    path = ROOT / room
    files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    assert files, f"{room} is gone: mend PURE"
    hits = {str(file.relative_to(ROOT)): forbidden_in(file.read_text("utf-8"), PURE[room]) for file in files}
    assert not {name: bad for name, bad in hits.items() if bad}


def test_checking_planning_and_master_load_no_torch() -> None:
    """One fresh process for each module would take long; one for all, asked after each import."""
    program = (
        "import importlib, json, sys\n"
        "loaded = {}\n"
        f"for name in {TORCHLESS!r}:\n"
        "    importlib.import_module(name)\n"
        "    loaded[name] = [m for m in ('torch', 'transformers') if m in sys.modules]\n"
        "print(json.dumps(loaded))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {name: found for name, found in json.loads(done.stdout).items() if found} == {}
