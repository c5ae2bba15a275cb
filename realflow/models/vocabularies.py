"""Whether models that read the same tokens mean the same by them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from realflow.errors import InputError, Problem
from realflow.graph.types import Call, Graph
from realflow.models.paths import find_model


def vocabulary_problems(graph: Graph) -> list[Problem]:
    """Where a call gives a model tokens of another vocabulary than its own.

    Tokens are numbers of the vocabulary of the model that wrote them (or that tokenized the data);
    to a model with other numbers they would be other text. Models that are not on this machine are
    passed over.
    """
    return [problem for call, writer in _readings(graph) for problem in _problems(graph, call, writer)]


def _readings(graph: Graph) -> Iterator[tuple[Call, str]]:
    """Calls whose model reads tokens, with the model in whose vocabulary these are."""
    for call in graph.calls:
        field = call.reads.get("tokens")
        if call.model is None or field is None:
            continue
        rollout = graph.writer(field)
        writer = graph.data.tokenize if rollout is None else rollout.model
        if writer is not None and graph.models[writer].path != graph.models[call.model].path:
            yield call, writer


def _problems(graph: Graph, call: Call, writer: str) -> Iterator[Problem]:
    assert call.model is not None
    reader = find_model(graph.models[call.model].path)
    source = find_model(graph.models[writer].path)
    if reader is None or source is None or reader == source:
        return
    theirs, ours = _vocabulary(source), _vocabulary(reader)
    place = graph.models[call.model].place
    rule = f"call {call.name} needs a model with the vocabulary of {writer}, which writes the tokens it reads"
    if call.op == "infer" and graph.models[call.model].head == "reward":
        rule += "; with 'retokenize: true' the call reads their text, in tokens of its own"
    if theirs is not None and ours is not None and theirs != ours:
        token = min(theirs.items() ^ ours.items(), key=lambda item: (item[1], item[0]))
        found = f"{_told(writer, theirs, token[1])}, {_told(call.model, ours, token[1])}"
        yield place.problem(f"{found}; {rule}")
        return
    if theirs is None or ours is None:
        sizes = {writer: _size(source), call.model: _size(reader)}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} has {size} tokens" for name, size in sizes.items())
            yield place.problem(f"{told}; {rule}")
        return
    size = _size(reader)
    if size is not None and max(theirs.values(), default=-1) >= size:
        message = f"{call.model} has embeddings for {size} tokens, {writer} numbers up to "
        yield place.problem(f"{message}{max(theirs.values())}; {rule}")


def _told(model: str, vocabulary: dict[str, int], number: int) -> str:
    """What a number means to a model, for a message."""
    texts = [text for text, index in vocabulary.items() if index == number]
    return f"token {number} of {model} is {texts[0]!r}" if texts else f"{model} has no token {number}"


@lru_cache(maxsize=8)
def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Text of each token -> its number, of a tokenizer.json; None without that file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    values = read_object(path)
    try:
        pieces = values["model"]["vocab"]
        # Unigram models list their pieces with their scores, in the order of their numbers.
        found = dict(pieces) if isinstance(pieces, dict) else {piece[0]: i for i, piece in enumerate(pieces)}
        return found | {token["content"]: token["id"] for token in values.get("added_tokens", ())}
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(Problem(f"is no tokenizer ({error!r} is missing)", file=str(path))) from error


def _size(folder: Path) -> int | None:
    """Rows of the embedding, as far as the config says."""
    config = read_object(folder / "config.json")
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file of a model folder; InputError where it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(Problem(f"cannot be read ({error.strerror})", file=str(path))) from error
    except ValueError as error:
        raise InputError(Problem(f"is not JSON ({error})", file=str(path))) from error
    if not isinstance(values, dict):
        raise InputError(Problem("holds no JSON object", file=str(path)))
    return values
