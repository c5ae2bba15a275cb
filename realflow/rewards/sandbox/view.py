"""What a contained program sees of the machine: the interpreter and its libraries, to read."""

from __future__ import annotations

import compileall
import os
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from realflow.rewards.sandbox.inside.job import HOME

_SYSTEM = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf.d",
)


@dataclass(frozen=True)
class View:
    """`python` is the interpreter; `read_only` files and folders, and `links` (path -> target), are in view.
    `inside` is the folder that holds the harness, `libraries` those of installed packages."""

    python: str
    read_only: tuple[str, ...]
    links: Mapping[str, str]
    inside: str
    libraries: tuple[str, ...]


@cache
def view() -> View:
    """That of the interpreter that this process runs."""
    python = os.path.realpath(sys.executable)
    inside = str(Path(__file__).resolve().parent)
    compileall.compile_dir(f"{inside}/inside", quiet=2)  # or each start would compile it anew
    libraries = dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    links, folders = {}, [python, inside, *libraries, os.path.join(os.path.realpath(sys.base_prefix), "lib")]
    folders.append(os.path.realpath(sysconfig.get_path("stdlib")))
    for path in _SYSTEM:
        if os.path.islink(path):
            links[path] = os.readlink(path)
        folders.append(os.path.realpath(path))
    shown = sorted({folder for folder in folders if os.path.exists(folder)})
    outermost = [path for path in shown if not any(path.startswith(f"{other}/") for other in shown)]
    if not any(path.startswith("/tmp/") for path in outermost):  # programs write to it by name
        links["/tmp"] = HOME
    return View(python, tuple(outermost), links, inside, tuple(libraries))


def environment(home: str, *, harness: bool) -> dict[str, str]:
    """All that a contained program has in its environment."""
    seen = view()
    path = [seen.inside] if harness else []
    return {
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join([*path, *seen.libraries]),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",  # threads are processes to the kernel, and their stacks memory
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def interpreter(*arguments: str) -> tuple[str, ...]:
    """The command that starts Python with no site, no user's folder, and no bytecode written."""
    return (view().python, "-S", "-s", "-B", *arguments)
