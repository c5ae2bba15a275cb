"""Models of a subject's shapes with few layers and random weights, made where they are measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from realflow.data.batch import Batch
from realflow.models.card import Card
from realflow.models.card import build as build_card
from realflow.models.causal import DTYPES, CausalModel, load_model
from realflow.models.place import Place
from realflow.profiling.request import (
    SMALL_VOCABULARY,
    STREAMED_BYTES,
    TRAINED_BYTES,
    Grids,
    Subject,
    smaller,
)

_SPREAD = 0.02
_FEWEST, _TOKENS = 2, 1 << 12
"""Layers of a pass of many tokens, and tokens times layers that are enough."""
SPREAD, SPREAD_STEPS = 3, 5
"""Sequences are up to a third shorter or longer than the mean, in so many steps."""


class Models:
    """Checkpoints in `folder`, and the newest model loaded from them (on a rank that has it)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._key: object = None
        self._model: CausalModel | None = None

    def get(
        self, subject: Subject, layers: int, vocab: int | None, place: Place, head: str = "lm"
    ) -> CausalModel:
        """A model with this many layers and token ids (None: the subject's own); no beginnings are shared,
        so that every token is computed."""
        key = (subject.name, layers, vocab, place, head)
        if self._key != key:
            self._key, self._model = None, None  # one model at a time in memory
            path = self.path(subject, layers, vocab)
            model = load_model(path, dtype=subject.dtype, device=self._device, place=place, head=head)
            self._key, self._model = key, replace(model, share=False)
        assert self._model is not None
        return self._model

    def path(self, subject: Subject, layers: int, vocab: int | None) -> Path:
        """Where such a model lies."""
        return self._folder / f"{subject.name}-{layers}-{vocab or 'own'}"

    def write(self, subject: Subject, grids: Grids) -> None:
        """Write the checkpoints of a subject. One process does so, before any rank reads them."""
        for layers, vocab in needed(subject, grids):
            path = self.path(subject, layers, vocab)
            if not path.is_dir():
                write_random(path, smaller(subject.config, layers=layers, vocab=vocab), subject.dtype)


def needed(subject: Subject, grids: Grids) -> tuple[tuple[int, int | None], ...]:
    """(layers, vocabulary) of the models that are measured."""
    counts = {trained_layers(subject, tokens) for tokens, _ in grids.layers}
    counts |= {streamed_layers(subject), trained_layers(subject), 1}
    return (*((layers, SMALL_VOCABULARY) for layers in sorted(counts)), (1, None))


def streamed_layers(subject: Subject) -> int:
    """Layers to be decoded together: so many that their weights do not stay in a CPU's caches, but no more
    than the model has."""
    return _layers(subject, STREAMED_BYTES, DTYPES[subject.dtype].itemsize)


def trained_layers(subject: Subject, tokens: int = 1) -> int:
    """Layers to be trained together by a pass of so many tokens: the more of them, the less it matters what
    of the weights is in the caches, and the longer it takes."""
    enough = _layers(subject, TRAINED_BYTES, DTYPES[subject.dtype].itemsize + 4)
    return min(enough, max(_FEWEST, _TOKENS // tokens))


def _layers(subject: Subject, wanted: int, each: int) -> int:
    return max(1, min(int(subject.config["num_hidden_layers"]), -(-wanted // (each * _elements(subject)))))


def _elements(subject: Subject) -> int:
    """About how many parameters a layer has (its large matrices)."""
    config = subject.config
    hidden = int(config["hidden_size"])
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or hidden // heads)
    pairs = int(config.get("num_key_value_heads") or heads)
    columns = int(config.get("intermediate_size") or 4 * hidden)
    return hidden * (2 * heads * size + 2 * pairs * size + 3 * columns)


def write_random(path: Path, config: Mapping[str, Any], dtype: str) -> None:
    """A model folder of this config with random weights."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**config, "dtype": dtype}), encoding="utf-8")
    card: Card = build_card(path)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for parameter in card.parameters:
        shape = parameter.shape
        values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * _SPREAD
        tensors[parameter.name] = values.to(DTYPES[dtype])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def uneven(count: int, length: int) -> list[int]:
    """Tokens of `count` sequences, `length` in the mean: as unequal as those of a run are, so that what is
    done about it (padding, and taking it away) is measured too."""
    found = [length] * count
    for index in range(count // 2):
        less = length * (index % SPREAD_STEPS + 1) // (SPREAD * SPREAD_STEPS)
        found[2 * index] -= less
        found[2 * index + 1] += less
    return found


def random_batch(model: CausalModel, tokens: int, length: int) -> Batch:
    """Sequences of `length` random tokens in the mean, `tokens` in all; all but their first are scored."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = int(model.config.get_text_config().vocab_size)
    lengths = torch.tensor(uneven(max(1, tokens // length), min(length, tokens)))
    total = int(lengths.sum())
    drawn = torch.randint(0, vocabulary, (total,), generator=generator)
    mask = torch.ones(total, dtype=torch.bool)
    mask[lengths.cumsum(0) - lengths] = False
    return Batch(tuple(range(len(lengths))), lengths, {"tokens": drawn, "loss_mask": mask})
