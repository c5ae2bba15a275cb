"""What a Hugging Face config alone says of a decoder: sizes, and what each layer computes. Pure.

decoder = read_decoder(json.loads(Path("config.json").read_text()), "lm")
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

Head = Literal["lm", "value", "reward"]
Norm = Literal["rms", "layer"]


@dataclass(frozen=True)
class Layer:
    """What one decoder layer computes.

    `window`: a query sees itself and the `window` - 1 tokens before it; None: all before it.
    `intermediate`: columns of its dense MLP; 0 where experts take its place. `experts` of
    `expert_columns` each, of which a token uses `active`; `shared_columns` of experts that every token
    uses, with a gate of one number where `shared_gate`.
    """

    window: int | None = None
    intermediate: int = 0
    experts: int = 0
    active: int = 0
    expert_columns: int = 0
    shared_columns: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class Decoder:
    """A decoder as far as costs go: `layers` one for each layer, from the first on.

    `gated`: an MLP has gate and up products, else up alone. `qkv_bias`, `out_bias`, `mlp_bias`: which
    products add a bias. `head_norms`: queries and keys are normalised head by head. `layer_norms`: norms
    of a layer over the hidden dim (2 or 4), of kind `norm` (a layer norm has a bias). `positions`: rows
    of a table of learnt positions, 0 with rotary ones. `head` is `lm` (logits over `vocab`, `tied` to
    the embedding or not), or `value` or `reward` (one number a row). `dtype` is the config's.
    `assumed` says what the config did not tell.
    """

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    layers: tuple[Layer, ...]
    tied: bool
    head: Head = "lm"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    layer_norms: int = 2
    norm: Norm = "rms"
    positions: int = 0
    dtype: str = "bfloat16"
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        values = tuple(getattr(self, name) for name in self.__dataclass_fields__)
        object.__setattr__(self, "_hash", hash(values))

    def __hash__(self) -> int:  # once: it is the key of every cached formula
        number: int = self._hash  # type: ignore[attr-defined]
        return number

    def kinds(self, first: int = 0, stop: int | None = None) -> dict[int, int]:
        """Of layers `[first, stop)`: the number of the first layer of each kind -> how many are like it."""
        counts = Counter(self.layers[first:stop])
        return {self.layers.index(layer): count for layer, count in counts.items()}

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows of its sliding layers, rising."""
        return tuple(sorted({layer.window for layer in self.layers if layer.window is not None}))

    @property
    def group(self) -> int:
        """Query heads of one key and value head."""
        return self.heads // self.kv_heads
