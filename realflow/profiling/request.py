"""What is measured, for whom and in what time: values. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Grid = tuple[tuple[int, int], ...]

STREAMED_BYTES = 160 << 20
"""A model's layers are decoded together until they have this many bytes, more than a CPU's caches."""
TRAINED_BYTES = 100 << 20
"""The same for training: weights, and the float32 buffer of their gradients."""
SMALL_VOCABULARY = 256
ONCE = 1.0
"""The noise of a point that was measured once: nobody knows."""


@dataclass(frozen=True)
class Grids:
    """The points that are measured.

    `layers`, `attention`: (tokens of a pass, tokens of each of its sequences). `decode`: (slots, context).
    `rows` of the head, `tokens` of the embedding, `slots` of a pass that is decoded and drawn. `messages` and
    `weights`: bytes of collectives and messages, and of gradients and weights that are moved.
    """

    layers: Grid = (
        *((32, 32), (128, 32), (128, 128)),
        *((512, 32), (512, 128), (512, 512)),
        *((2048, 32), (2048, 128), (2048, 512)),
    )
    attention: Grid = ((512, 32), (512, 128), (512, 512), (4096, 32), (4096, 128), (4096, 512))
    decode: Grid = tuple((slots, context) for context in (64, 512) for slots in (1, 4, 16, 32, 64))
    rows: tuple[int, ...] = (16, 64, 256, 1024)
    tokens: tuple[int, ...] = (64, 1024)
    slots: tuple[int, ...] = (1, 4, 16, 64)
    messages: tuple[int, ...] = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
    weights: tuple[int, ...] = (1 << 20, 1 << 24, 1 << 27)


@dataclass(frozen=True)
class Subject:
    """A model to be measured: its Hugging Face config, and the dtype of its compute weights."""

    name: str
    config: Mapping[str, Any]
    dtype: str


@dataclass(frozen=True)
class Setting:
    """Under which circumstances ranks compute: `busy` of them at once, each with `threads`; `t` of them
    divide each layer."""

    threads: int
    busy: int
    t: int = 1

    @property
    def key(self) -> dict[str, str | int]:
        """As tables are found by it."""
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """Subjects to be measured by `ranks` processes on a machine of `cores`, in about `seconds`, each point at
    most `repeats` times."""

    subjects: tuple[Subject, ...]
    ranks: int
    cores: int
    device: str
    seconds: float
    grids: Grids = Grids()
    repeats: int = 15

    def settings(self) -> tuple[Setting, ...]:
        """Every circumstance that runs of up to `ranks` ranks meet.

        A run of n ranks has cores / n threads in each, at least one; any number of its ranks compute at
        once. GPUs do not share what is counted here. Those with more threads than cores come last: they
        take longest, and matter least.
        """
        if self.device != "cpu":
            return tuple(Setting(1, t, t) for t in powers(self.ranks))
        found = {
            Setting(max(1, self.cores // world), busy)
            for world in powers(self.ranks)
            for busy in powers(world)
        }
        cut = {Setting(max(1, self.cores // t), t, t) for t in powers(self.ranks) if t > 1}
        return tuple(sorted(found | cut, key=self._order))

    def _order(self, one: Setting) -> tuple[int, ...]:
        return one.busy * one.threads > self.cores, one.t, one.busy, -one.threads

    def to_json(self) -> str:
        """For the ranks' processes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """What `to_json` wrote."""
        values = json.loads(text)
        values["subjects"] = tuple(Subject(**one) for one in values["subjects"])
        grids = {name: tuple(map(_tuple, points)) for name, points in values["grids"].items()}
        values["grids"] = Grids(**grids)
        return cls(**values)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def powers(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `most`, and `most` itself."""
    found = [1 << bit for bit in range(most.bit_length()) if 1 << bit <= most]
    return tuple(sorted({*found, most}))


def smaller(config: Mapping[str, Any], *, layers: int, vocab: int | None = None) -> dict[str, Any]:
    """A config with other numbers of layers (like its first ones) and of token ids."""
    found = dict(config)
    found["num_hidden_layers"] = layers
    kinds = found.get("layer_types")
    if kinds:
        found["layer_types"] = [kinds[index % len(kinds)] for index in range(layers)]
    if vocab is not None:
        found["vocab_size"] = vocab
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found[name] = None
    return found
