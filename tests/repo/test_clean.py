"""What must never be in the repository, and that everything in it is small text."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Split, so that this file does not match itself.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:wo" r"rk|ro" r"ot|ho" r"me|op" r"t)/[\w.]")
REGISTRIES = re.compile(
    r"py"
    r"pi\.org|python"
    r"hosted\.org|download\.py"
    r"torch\.org|reg"
    r"istry\.npmjs|conda\.an"
    r"aconda"
    r"|(?:extra-)?index"
    r"-url",
    re.IGNORECASE,
)
# What ruff (S, BLE) does not see: it finds pickle, shell=True and broad excepts that swallow.
UNSAFE = re.compile(
    r"trust_remote_code\s*=\s*True|shell\s*=\s*True|^\s*(?:import|from) pickle"
    r"|yaml\.(?:unsafe_load|full_load)\b|\b(?:TODO|FIXME|XXX)\b",
    re.MULTILINE,
)
LARGEST = 1 << 20


def tracked() -> list[Path]:
    """Files under version control that exist (links themselves, not what they lead to)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [path for path in files if path.is_file() and not path.is_symlink()]


def found(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    """`path:line: match` for each match."""
    hits = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := pattern.search(line):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {match.group(0)}")
    return hits


def test_the_patterns_find_what_they_are_for() -> None:
    """The control: each pattern matches an example of what it forbids, and not a harmless one."""
    assert MACHINE_PATHS.search("see /" + "opt/things") and not MACHINE_PATHS.search("docs/design/x and/or")
    assert REGISTRIES.search("https://py" + "pi.org/simple")
    assert UNSAFE.search("run(x, shell" + "=True)") and not UNSAFE.search("except ValueError:")


def test_no_machine_paths() -> None:
    assert found(MACHINE_PATHS, tracked()) == []


def test_no_registry_hosts() -> None:
    assert found(REGISTRIES, tracked()) == []


def test_no_unsafe_or_unfinished_code() -> None:
    rooms = ("realflow", "planner", "csrc", "experiments")
    code = [path for path in tracked() if path.relative_to(ROOT).parts[0] in rooms]
    assert found(UNSAFE, [path for path in code if path.suffix in {".py", ".cpp", ".h"}]) == []


def test_files_are_small() -> None:
    assert [str(path) for path in tracked() if path.stat().st_size > LARGEST] == []


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
