"""Which model is meant, and how to know that it is still the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realflow.errors import InputError, Problem
from realflow.models.paths import is_model, resolve_model
from realflow.runtime.directory import checkpoints


def model_folder(name: str) -> str:
    """The model that is meant: of a run's folder the newest checkpoint, of a checkpoint the model in it.

    What is no folder of this machine is a name or a hub id, and stays as it is. Raises InputError where a
    checkpoint holds several models, or none.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    if is_model(folder):
        return str(folder.resolve())
    if (folder / "checkpoints").is_dir():
        found = checkpoints(folder)
        if not found:
            raise InputError(Problem("the run has no checkpoint yet", file=name))
        folder = found[-1]
    models = sorted(path for path in folder.iterdir() if is_model(path))
    if len(models) == 1:
        return str(models[0].resolve())
    if not models:
        return name  # what finds models says what it expects
    names = ", ".join(str(path) for path in models)
    raise InputError(Problem(f"there are several models in it; name one of {names}", file=name))


def weights(graph: Mapping[str, Any]) -> dict[str, Any]:
    """The files of each model: their sizes and when they were written."""
    found: dict[str, Any] = {}
    for name, model in graph["models"].items():
        folder = resolve_model(model["path"])
        files = sorted({*folder.glob("config.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")})
        found[name] = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    return found
