"""Graph files by name or path: those that RealFlow ships, and the user's own."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from realflow.errors import InputError
from realflow.graph.schema import nearest


def graphs_folder() -> Path:
    """Where the shipped graphs lie: package data of a wheel, or the repository's `graphs/`."""
    return Path(str(files("realflow"))) / "graphs"


def shipped_graphs() -> dict[str, Path]:
    """Name -> file of every shipped graph, by name."""
    return {path.stem: path for path in sorted(graphs_folder().glob("*.yaml"))}


def find_graph(name_or_path: str | Path) -> Path:
    """The graph file that a user means: `grpo` is shipped, `./mine.yaml` or `runs/mine` is a path.

    An existing file goes before a shipped name. Raises InputError with the nearest name.
    """
    text = str(name_or_path)
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = shipped_graphs()
    if text in shipped:
        return shipped[text]
    if path.suffix in (".yaml", ".yml") or "/" in text:
        if path.stem in shipped and "/" not in text:
            raise InputError(
                f"{text}: no such file here; the shipped graph is called {path.stem!r}, without {path.suffix}"
            )
        what = "this is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{text}: {what}; expected a graph file, or a shipped graph: {', '.join(shipped)}")
    raise InputError(f"{text!r} is neither a file nor a shipped graph; {nearest(text, shipped)}")
