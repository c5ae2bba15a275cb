"""Whether the models of a graph can do what its calls ask, as far as their files tell. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from realflow.errors import InputError, Problem
from realflow.graph.types import Graph, Head
from realflow.models.paths import find_model
from realflow.models.vocabularies import read_object, vocabulary_problems

HEAD = "score.weight"
"""The head of a sequence classifier, [labels, hidden]: what a value or reward head is stored as."""


def check_fitting(graph: Graph) -> None:
    """Raise InputError with every model of this machine whose head or vocabulary is not what the graph
    asks for. Models that are not here are passed over."""
    problems = [*_head_problems(graph), *vocabulary_problems(graph)]
    if problems:
        raise InputError(problems)


def _head_problems(graph: Graph) -> list[Problem]:
    found = []
    for model in graph.models.values():
        folder = find_model(model.path)
        message = wrong_head(folder, model.head) if folder is not None else ""
        if message:
            found.append(model.place.problem(message))
    return found


def wrong_head(folder: Path, head: Head) -> str:
    """Why a model folder cannot be used with a head; empty where it can, or its files cannot be read
    (which loading it tells of). Only headers of the files are read."""
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
    if head == "value" or not files:  # the head of a critic starts from zeros
        return ""
    architectures = read_object(folder / "config.json").get("architectures") or ["model"]
    return f"{folder} is a {architectures[0]} without {HEAD}; {rule}"


def _shape(file: Path, name: str) -> tuple[int, ...] | None:
    """The shape of a tensor in a safetensors file, None where it has none of this name."""
    with safe_open(file, framework="numpy") as tensors:
        return tuple(tensors.get_slice(name).get_shape()) if name in tensors.keys() else None  # noqa: SIM118
