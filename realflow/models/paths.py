"""Where models are found: the cache, a local folder, or the Hugging Face hub. Imports no torch."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from realflow.errors import InputError, Problem

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


MADE = {
    "smollm2-135m-sums-reward": "made once by: python experiments/ppo/reward_model.py (in a checkout of "
    "RealFlow, see docs/ppo.md); or set reward_model to a reward model of yours",
}
"""Models that shipped graphs name and nobody publishes -> how to get them."""


def cache_dir() -> Path:
    """The folder for models and cards: `REALFLOW_CACHE`, or `~/.cache/realflow`."""
    return Path(os.environ.get("REALFLOW_CACHE") or Path.home() / ".cache" / "realflow")


def models_dir() -> Path:
    """The folder that holds fetched models, one folder for each name."""
    return cache_dir() / "models"


def is_model(path: Path) -> bool:
    """Whether a folder holds a Hugging Face model."""
    return (path / "config.json").is_file()


def cached_models() -> dict[str, Path]:
    """Name -> folder of every model in the cache."""
    root = models_dir()
    if not root.is_dir():
        return {}
    return {path.name: path for path in sorted(root.iterdir()) if is_model(path)}


def find_model(name_or_path: str) -> Path | None:
    """The folder of a model that is on this machine already, or None. Never uses the network.

    A name in the cache comes first, then a folder (of the current one, where it is relative), then the
    hub's own cache. A folder beside a graph file goes before all: load_graph has its whole path.
    """
    if name_or_path in (cached := cached_models()):
        return cached[name_or_path]
    folder = Path(name_or_path).expanduser()
    if is_model(folder):
        return folder
    return _from_hub(name_or_path, local_only=True) if _HUB_ID.fullmatch(name_or_path) else None


def resolve_model(name_or_path: str) -> Path:
    """The folder of a model: a name in the cache, a folder, or a hub id such as `org/name`.

    A hub id that is not yet on this machine is downloaded (weights as safetensors only). Raises
    InputError, which says how to get the model, where none of them gives one.
    """
    found = find_model(name_or_path)
    if found is not None:
        return found
    folder = Path(name_or_path).expanduser()
    if folder.exists():
        what = "has no config.json" if folder.is_dir() else "is a file"
        raise InputError(
            Problem(f"{name_or_path} {what}; expected the folder of a Hugging Face model", where="model")
        )
    if _HUB_ID.fullmatch(name_or_path) and not name_or_path.startswith("."):
        hub = _from_hub(name_or_path, local_only=False)
        assert hub is not None
        return hub
    raise InputError(Problem(_unknown(name_or_path), where="model"))


def absent(name: str) -> str:
    """What to say of a model that is not on this machine: how to get it."""
    from realflow.models.fetch import KNOWN

    if name in KNOWN:
        return f"{name} is not in the cache ({models_dir()}); run: realflow models fetch {name}"
    if name in MADE:
        return f"{name} is not in the cache ({models_dir()}): {MADE[name]}"
    if _HUB_ID.fullmatch(name):
        return f"{name} is not on this machine; plan and run download it"
    return f"{name} is not on this machine (see realflow models)"


def _unknown(name: str) -> str:
    from realflow.models.fetch import KNOWN

    if name in KNOWN or name in MADE:
        return absent(name)
    names = sorted({*KNOWN, *cached_models()})
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    known = ", ".join(names)
    return (
        f"{name!r} is no model: {_searched()}, and not in the cache; {hint}expected a folder, a hub "
        f"id (org/name) or one of: {known} (realflow models fetch NAME)"
    )


def _searched() -> str:
    """Where folders are looked for; a graph holds the whole path of one beside its file."""
    return f"no folder of that name beside the graph file or in {Path.cwd()}"


def _from_hub(name: str, *, local_only: bool) -> Path | None:
    """The hub's snapshot of a model; None where `local_only` finds none."""
    if local_only and not (_hub_cache() / f"models--{name.replace('/', '--')}").is_dir():
        return None  # spares the import of the hub's client
    from huggingface_hub import errors, snapshot_download

    # The client's HTTP library, whose errors pass through, changed its name between versions.
    transport: type = errors.HfHubHTTPError.__mro__[1]
    trouble: tuple[type[Exception], ...] = (
        transport,
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
        OSError,
    )
    try:
        folder = Path(
            snapshot_download(
                name,
                allow_patterns=list(_HUB_FILES),
                local_files_only=local_only,
                cache_dir=_hub_cache(),
            )
        )
    except trouble as error:
        if local_only:
            return None
        raise InputError(
            Problem(
                f"{name!r} is not on this machine ({_searched()}) and cannot be downloaded "
                f"({_first_line(error)}); give a "
                "folder, or put a model in the cache with: realflow models fetch NAME",
                where="model",
            )
        ) from error
    return folder if is_model(folder) else None


def _hub_cache() -> Path:
    """The hub's cache, as its client finds it, but read now and not when that is imported."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
