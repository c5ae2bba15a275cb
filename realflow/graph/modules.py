"""Importing the modules that users write beside their graph file.

A module beside the graph is loaded from its file under a name that no other file has: it shadows
nothing, two graphs in one process each get their own, and an edited file is read afresh. What such a
module imports is looked up as in a worker, with the graph's folder at the end of the path: the standard
library and installed packages come first.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import CodeType, ModuleType

_MARK = "__realflow_folder__"
_OWN = ("realflow", "planner")


def import_user_module(name: str, folder: Path | None) -> ModuleType:
    """The module `name` (dotted): the one in `folder` where a file of it is there, else the installed one.

    A package that is installed from `folder` (an editable install) is imported by its own name. Raises
    whatever the import raises.
    """
    if folder is None:
        return importlib.import_module(name)
    folder = folder.resolve()
    top, _, rest = name.partition(".")
    with _siblings(folder, top):
        if not _is_there(folder, name) or (rest and _is_installed(top, folder)):
            return importlib.import_module(name)
        alias = f"{top}@{_digest(folder, top)}"
        if alias not in sys.modules:
            _load(alias, folder / top)
        return importlib.import_module(f"{alias}.{rest}" if rest else alias)


class _Afresh(SourceFileLoader):
    """Compiles the file that is there: cached bytecode counts as fresh for a second after an edit."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _load(alias: str, place: Path) -> None:
    """Put the module or package at `place` (without suffix) into `sys.modules` as `alias`."""
    package = place.is_dir() and not place.with_suffix(".py").is_file()
    file = place / "__init__.py" if package else place.with_suffix(".py")
    loader = _Afresh(alias, str(file)) if file.is_file() else None  # None: a folder without __init__.py
    spec = ModuleSpec(alias, loader, origin=str(file) if loader else None, is_package=package)
    spec.has_location = loader is not None
    if package:
        spec.submodule_search_locations = [str(place)]
    module = module_from_spec(spec)
    sys.modules[alias] = module  # before it runs: dataclasses and relative imports look here
    if loader is None:
        return
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[alias]
        raise


def _is_there(folder: Path, name: str) -> bool:
    place = folder.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def _is_installed(top: str, folder: Path) -> bool:
    """Whether Python finds this very package without having `folder` on its path."""
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != folder]
    try:
        spec = find_spec(top)
    finally:
        sys.path[:] = path
    locations = spec.submodule_search_locations if spec is not None else None
    return any(Path(location).resolve() == folder / top for location in locations or ())


def _digest(folder: Path, top: str) -> str:
    """Of the source that a module can consist of: the files beside the graph, and those of its package."""
    state = hashlib.sha256(str(folder).encode())
    for file in sorted({*folder.glob("*.py"), *(folder / top).rglob("*.py")}):
        if os.access(file, os.R_OK) and file.is_file():  # what cannot be read cannot be imported either
            state.update(f"\0{file}\0".encode(errors="surrogateescape") + file.read_bytes())
    return state.hexdigest()[:16]


@contextmanager
def _siblings(folder: Path, top: str) -> Iterator[None]:
    """`folder` at the end of the import path, without modules that another folder or an older state of
    this one has left under the names of its files."""
    mark = (str(folder), _digest(folder, top))
    for name, module in list(sys.modules.items()):
        # Not getattr: modules that load lazily would import what they can.
        if getattr(module, "__dict__", {}).get(_MARK, mark) != mark:
            del sys.modules[name]
    importlib.invalidate_caches()
    before = set(sys.modules)
    added = str(folder) not in sys.path
    if added:
        sys.path.append(str(folder))
    try:
        yield
    finally:
        if added:
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            root = name.partition(".")[0]
            if "@" not in root and root not in _OWN and root not in before and _lies_in(folder, root):
                setattr(sys.modules[name], _MARK, mark)


def _lies_in(folder: Path, top: str) -> bool:
    """Whether a module that is loaded as `top` is a file or package of `folder`."""
    module = sys.modules.get(top)
    file, path = getattr(module, "__file__", None), getattr(module, "__path__", ())
    places = [*path] if path else [file] if file else []
    return any(Path(place).resolve().parent == folder for place in places)
