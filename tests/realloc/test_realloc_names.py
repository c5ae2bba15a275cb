"""`from realflow.realloc import ...`: what is promised, and no torch for what is pure."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import realflow.realloc as room

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_is_there_and_is_no_module() -> None:
    """A module takes the place of a name that it shares as soon as it is imported: import them all."""
    modules = {module.name for module in pkgutil.iter_modules(room.__path__)}
    for name in modules:
        importlib.import_module(f"realflow.realloc.{name}")
    assert not modules & {*room.__all__}
    for name in room.__all__:
        assert not isinstance(getattr(room, name), ModuleType), name
    assert sorted(room.__all__) == sorted(name for names in room._HOMES.values() for name in names)
    assert {*room.__all__} <= {*dir(room)}
    with pytest.raises(AttributeError, match="no attribute 'transfer'"):
        _ = room.transfer


def test_the_short_imports_load_torch_only_where_something_is_moved() -> None:
    """In a fresh process, so that nothing has been imported before; `Storage` is the control."""
    program = (
        "import json, sys\n"
        "from realflow.realloc import Schedule, TensorSpec, Topology, Transfer\n"
        "from realflow.realloc import loads, replicated, transfers\n"
        "one, other = replicated({'w': [2, 3]}, 4, [0]), replicated({'w': [2, 3]}, 4, [1])\n"
        "found = transfers(one, other, Topology({0: 'a', 1: 'b'}))\n"
        "seen = [found.bytes, 'torch' in sys.modules]\n"
        "from realflow.realloc import Storage\n"
        "print(json.dumps([*seen, 'torch' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [24, False, True]
