"""Whether the models of a graph can do what its calls ask, as far as their files tell. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from realflow.errors import InputError, Problem
from realflow.graph.types import Graph, Head
from realflow.models.adapters import is_linear, target_problem
from realflow.models.paths import find_model
from realflow.models.vocabularies import read_object, vocabulary_problems
from realflow.rewards.sandbox.ability import uncontained

HEAD = "score.weight"
"""The head of a sequence classifier, [labels, hidden]: what a value or reward head is stored as."""


def check_fitting(graph: Graph) -> None:
    """Raise InputError with every model of this machine whose head, vocabulary or layers are not what the
    graph asks for, and every call that runs programs where this machine cannot contain them. Models that are
    not here are passed over."""
    problems = [*_head_problems(graph), *vocabulary_problems(graph), *_target_problems(graph)]
    problems += uncontained(graph)
    if problems:
        raise InputError(problems)


def _head_problems(graph: Graph) -> list[Problem]:
    found = []
    for model in graph.models.values():
        folder = find_model(model.path)
        trained = model.optimizer is not None
        message = wrong_head(folder, model.head, trained) if folder is not None else ""
        if message:
            found.append(model.place.problem(message))
    return found


def _target_problems(graph: Graph) -> list[Problem]:
    """Adapters of layers that a model does not have."""
    found = []
    for name, model in graph.models.items():
        folder = find_model(model.path) if model.lora and model.lora.targets else None
        if folder is None or model.lora is None:
            continue
        try:
            linear = [key for file in sorted(folder.glob("*.safetensors")) for key in _linear(file)]
        except (OSError, SafetensorError):
            continue  # loading it tells of that
        message = target_problem(linear, model.lora) if linear else ""
        if message:
            place = replace(model.place, where=f"models.{name}.lora.targets", line=None, params=())
            found.append(place.problem(f"{folder}: {message}"))
    return found


def _linear(file: Path) -> list[str]:
    """The weights of a file that are those of linear layers."""
    with safe_open(file, framework="numpy") as tensors:
        shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return [key for key, shape in shapes.items() if is_linear(key, shape)]


def wrong_head(folder: Path, head: Head, trained: bool = False) -> str:
    """Why a model folder cannot be used with a head; empty where it can, or its files cannot be read
    (which loading it tells of). One that is `trained` may lack it. Only headers of the files are read."""
    if head == "lm":
        return ""
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("*.safetensors"))
    try:
        shapes = [shape for file in files if (shape := _shape(file, HEAD)) is not None]
    except (OSError, SafetensorError):
        return ""
    rule = "expected a sequence classifier with one label"
    if shapes:
        labels = shapes[0][0]
        return "" if labels == 1 else f"{folder} has a head for {labels} labels ({HEAD}); {rule}"
    if head == "value" or trained or not files:  # a head that is learnt starts from zeros
        return ""
    architectures = read_object(folder / "config.json").get("architectures") or ["model"]
    return f"{folder} is a {architectures[0]} without {HEAD}; {rule}"


def _shape(file: Path, name: str) -> tuple[int, ...] | None:
    """The shape of a tensor in a safetensors file, None where it has none of this name."""
    with safe_open(file, framework="numpy") as tensors:
        return tuple(tensors.get_slice(name).get_shape()) if name in tensors.keys() else None  # noqa: SIM118
