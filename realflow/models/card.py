"""A model's card: what checking and planning know of it. Reading a card imports no torch.

A card is made once for each config, on torch's meta device (no weights are allocated) and in a
process of its own, and kept as JSON under the cache's `cards/`:

    python -m realflow.models.card FOLDER
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import realflow
from realflow.errors import InputError, Problem
from realflow.models.paths import cache_dir

FORMAT = 3
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_VOLATILE = {"_name_or_path", "transformers_version"}
_DIGEST = re.compile(r"[0-9a-f]{16}")
_SECONDS = 300  # a fresh process that imports torch and builds the modules, on a busy machine


@dataclass(frozen=True)
class Parameter:
    """One parameter, named and shaped as in the Hugging Face checkpoint; `dtype` is the config's."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Card:
    """What is known of a model without its weights.

    `parameters` are in module order, a tied one once; `tied` maps every other name of a tied
    parameter to the one in `parameters`. `tensor_styles` and `pipeline_styles` are the model's
    own `tp_plan` and `pp_plan` (prefixes and head merged): module pattern -> style, and module ->
    (inputs, outputs); the latter is empty where the modules do not keep to it. `unsupported` says why
    RealFlow cannot run the model at all, `unsupported_head` why not with its language-model head.
    """

    hash: str
    architecture: str
    model_type: str
    parameters: tuple[Parameter, ...]
    tied: Mapping[str, str]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tensor_styles: Mapping[str, str]
    pipeline_styles: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
    unsupported: str = ""
    unsupported_head: str = ""

    @property
    def size(self) -> int:
        """Number of parameter elements, tied ones once."""
        return sum(parameter.size for parameter in self.parameters)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all parameters in a compute dtype (`bfloat16`, `float32`, `float64`)."""
        return self.size * ITEMSIZE[dtype]


def config_hash(model: Path) -> str:
    """SHA-256 (hex, 16 digits) of a model folder's config, without its volatile keys.

    Raises InputError where config.json is missing or not a JSON object.
    """
    path = model / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(Problem(f"cannot be read ({error.strerror})", file=str(path))) from error
    except ValueError as error:
        raise InputError(Problem(f"is not JSON ({error})", file=str(path))) from error
    if not isinstance(config, dict):
        raise InputError(Problem(f"holds a {type(config).__name__}; expected an object", file=str(path)))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def card(model: Path | str, say: Callable[[str], None] | None = None) -> Card:
    """The card of a model folder, from the cache or made now (some seconds, in another process).

    A card made by another version of transformers, whose names may differ, is made anew. `say` is told
    before one is made. Raises InputError where the folder is no model that transformers can build
    without remote code.
    """
    folder = Path(model)
    digest = config_hash(folder)
    path = cache_dir() / "cards" / f"{digest}.json"
    found = _read(path)
    if found is None:
        if say is not None:
            say(f"making the card of {folder.name}: its shapes and how it can be cut (once, some seconds)")
        _make(folder)
        found = _read(path)
        assert found is not None, path
    return found


def cached(digest: str) -> Card | None:
    """The card of a config hash, if it was made on this machine; the model itself need not be here."""
    return _read(cache_dir() / "cards" / f"{digest}.json") if _DIGEST.fullmatch(digest) else None


def to_mapping(card: Card) -> dict[str, Any]:
    """JSON values of a card, with what it was made by."""
    return {**asdict(card), "made_by": _maker()}


def from_mapping(values: Mapping[str, Any]) -> Card:
    """The card that `to_mapping` wrote."""
    fields = {key: value for key, value in values.items() if key != "made_by"}
    fields["parameters"] = tuple(
        Parameter(item["name"], tuple(item["shape"]), item["dtype"]) for item in values["parameters"]
    )
    fields["pipeline_styles"] = {
        name: (tuple(inputs), tuple(outputs)) for name, (inputs, outputs) in values["pipeline_styles"].items()
    }
    return Card(**fields)


def _maker() -> dict[str, Any]:
    return {"format": FORMAT, "transformers": importlib.metadata.version("transformers")}


def _read(path: Path) -> Card | None:
    """The cached card, or None where there is none of this format and version of transformers."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:  # not our doing (we rename complete files): made anew, like an old one
        return None
    return from_mapping(values) if values.get("made_by") == _maker() else None


def _make(folder: Path) -> None:
    """Make a card in a process of its own, so that this one never imports torch."""
    source = str(Path(realflow.__file__).parent.parent)
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-m", "realflow.models.card", str(folder)]
    try:
        done = subprocess.run(
            command,
            env=env,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            Problem(f"its modules could not be built within {_SECONDS} s", file=str(folder), where="model")
        ) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(
            Problem(
                f"transformers cannot build this model without remote code: {lines[-1]}",
                file=str(folder),
                where="model",
            )
        )


def build(folder: Path) -> Card:
    """Make the card of a model folder in this process. Imports torch and transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from realflow.models.stages import keeps_stages
    from realflow.models.supported import body_problem, head_problem

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    dtype = config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    owners: dict[int, str] = {}
    parameters: list[Parameter] = []
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
            continue
        parameters.append(
            Parameter(name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        )
    problem = body_problem(model)
    text = config.get_text_config()
    heads = text.num_attention_heads
    return Card(
        hash=config_hash(folder),
        architecture=type(model).__name__,
        model_type=config.model_type,
        parameters=tuple(parameters),
        tied=tied,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        max_positions=text.max_position_embeddings,
        tensor_styles=dict(sorted(model.tp_plan.items())),
        pipeline_styles={
            name: (tuple(inputs), tuple(outputs)) for name, (inputs, outputs) in sorted(model.pp_plan.items())
        }
        if keeps_stages(model)
        else {},
        unsupported=problem,
        unsupported_head="" if problem else head_problem(model),
    )


def store(card: Card) -> Path:
    """Write a card into the cache, beside and renamed into place, and return its path."""
    folder = cache_dir() / "cards"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{card.hash}.json"
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(to_mapping(card), indent=1), encoding="utf-8")
    os.replace(beside, path)
    return path


if __name__ == "__main__":
    store(build(Path(sys.argv[1])))
