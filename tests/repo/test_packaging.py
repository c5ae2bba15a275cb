"""What is shipped: graphs are found from a wheel, an editable install and the repository's root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("realflow", "planner", "graphs", "csrc", "setup.py", "pyproject.toml", "README.md", "MANIFEST.in")
WHERE = "import realflow, realflow.graph as g; print(realflow.__file__, g.find_graph('grpo'), sep='\\n')"


def run(arguments: list[str], folder: Path, **env: str) -> str:
    """The standard output; fails with both outputs."""
    done = subprocess.run(
        arguments, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree, so that no build of the checkout itself is touched."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(source, tree / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    run([*pip, str(out), "."], tree)
    (built,) = out.glob("realflow-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked by pip in a folder of its own; what it needs comes from this environment."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target"]
    run([*pip, str(target), str(wheel)], target)
    return target


def test_wheel_holds_what_it_should(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    graphs = {f"realflow/graphs/{path.name}" for path in (ROOT / "graphs").glob("*.yaml")}
    assert graphs and graphs <= names
    assert {"realflow/_C.so", "realflow/cli.py", "realflow/py.typed", "planner/__init__.py"} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"realflow", "planner"}


def test_graphs_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    places = run([sys.executable, "-c", WHERE], tmp_path, PYTHONPATH=str(installed)).split()
    assert [Path(place).is_relative_to(installed) for place in places] == [True, True]
    assert "grpo" in run([sys.executable, "-m", "realflow", "graphs"], tmp_path, PYTHONPATH=str(installed))


def test_extension_of_the_wheel_loads(installed: Path, tmp_path: Path) -> None:
    program = (
        "import torch, realflow, pathlib; path = pathlib.Path(realflow.__file__).with_name('_C.so');"
        "torch.ops.load_library(str(path)); print(torch.ops.realflow.move, path)"
    )
    assert str(installed) in run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(installed))


def test_graphs_from_an_editable_install(tmp_path: Path) -> None:
    """`make setup` installs so; seen from any other folder."""
    places = run([sys.executable, "-c", WHERE], tmp_path, PYTHONPATH="").split()
    assert all(Path(place).resolve().is_relative_to(ROOT) for place in places), places


def test_graphs_from_the_root() -> None:
    """The root comes first on the path of `python -m`, whatever is installed."""
    assert "grpo" in run([sys.executable, "-m", "realflow", "graphs"], ROOT, PYTHONPATH="")


def test_a_build_without_compiler_says_so(tmp_path: Path) -> None:
    """The control of setup.py's own error: one sentence, no traceback."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "no-such-compiler" in done.stderr and "Traceback" not in done.stderr
