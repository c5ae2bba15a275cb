"""What a Hugging Face config alone says of a decoder: sizes, and what each layer computes. Pure.

    decoder = read_decoder(json.loads(Path("config.json").read_text()), "lm")

`planner.families` says how each family's config is to be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, Literal

from planner.families import ConfigReader, family_of
from realflow.models.partition import balanced

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
    of a layer over the hidden dim (2 or 4), of kind `norm` (a layer norm has a bias). `head` is `lm`
    (logits over `vocab`, `tied` to the embedding or not), or `value` or `reward` (one number a row).
    `dtype` is the config's. `assumed` says what the config did not tell.
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
    dtype: str = "bfloat16"
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        values = tuple(getattr(self, name) for name in self.__dataclass_fields__)
        object.__setattr__(self, "_hash", hash(values))

    def __hash__(self) -> int:  # once: it is the key of every cached formula
        number: int = self._hash  # type: ignore[attr-defined]
        return number

    def kinds(self, first: int = 0, stop: int | None = None) -> Mapping[int, int]:
        """Of layers `[first, stop)`: the number of the first layer of each kind -> how many are like it."""
        return _kinds(self, first, stop)

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """The windows of its sliding layers, rising."""
        return tuple(sorted({layer.window for layer in self.layers if layer.window is not None}))

    @property
    def group(self) -> int:
        """Query heads of one key and value head."""
        return self.heads // self.kv_heads

    @cached_property
    def sparse(self) -> bool:
        """Whether any layer has experts."""
        return any(layer.experts for layer in self.layers)

    @property
    def products_of_mlp(self) -> int:
        """Products of an MLP, or of an expert, with equal numbers of weights."""
        return 3 if self.gated else 2

    @property
    def norm_size(self) -> int:
        """Parameters of one norm over the hidden dim."""
        return self.hidden * (2 if self.norm == "layer" else 1)

    def layer_size(self, kind: int, *, active: bool = False) -> int:
        """Parameters of a layer; with `active` those that one token is computed with."""
        layer, hidden = self.layers[kind], self.hidden
        queries, pairs = self.heads * self.head_dim, self.kv_heads * self.head_dim
        size = hidden * (2 * queries + 2 * pairs) + self.layer_norms * self.norm_size
        size += (queries + 2 * pairs) * self.qkv_bias + hidden * self.out_bias
        size += 2 * self.head_dim * self.head_norms
        columns = layer.intermediate + layer.shared_columns
        columns += (layer.active if active else layer.experts) * layer.expert_columns
        size += self.products_of_mlp * hidden * columns + hidden * (layer.experts + layer.shared_gate)
        if self.mlp_bias:
            size += (self.products_of_mlp - 1) * layer.intermediate + hidden * bool(layer.intermediate)
        return size

    @property
    def embedding_size(self) -> int:
        """Parameters of the table of token ids."""
        return self.vocab * self.hidden

    @property
    def head_size(self) -> int:
        """Parameters that the head multiplies with, also where they are the embedding's."""
        return self.embedding_size if self.head == "lm" else self.hidden

    @property
    def size(self) -> int:
        """All parameters, tied ones once."""
        layers = sum(self.layer_size(kind) * count for kind, count in self.kinds().items())
        return layers + self.norm_size + self.embedding_size + (0 if self.tied else self.head_size)


@lru_cache(maxsize=65536)
def _kinds(decoder: Decoder, first: int, stop: int | None) -> Mapping[int, int]:
    counts = Counter(decoder.layers[first:stop])
    return MappingProxyType({decoder.layers.index(layer): count for layer, count in counts.items()})


@lru_cache(maxsize=1024)
def stage_cuts(decoder: Decoder, count: int) -> tuple[tuple[int, int], ...]:
    """The layers `[first, stop)` of each of `count` pipeline stages, so that the slowest is as fast as can
    be: for models that run, those of `realflow.models.partition.stages`."""
    assert 1 <= count <= len(decoder.layers), (count, len(decoder.layers))
    known = {layer: decoder.layer_size(kind, active=True) for kind in decoder.kinds()
             for layer in [decoder.layers[kind]]}  # fmt: skip
    sizes = [float(known[layer]) for layer in decoder.layers]
    last = float(decoder.norm_size + decoder.head_size)
    ends = balanced(sizes, count, float(decoder.hidden), last)
    return tuple(zip((0, *ends[:-1]), ends, strict=True))


def read_decoder(config: Mapping[str, Any], head: Head = "lm", file: str = "") -> Decoder:
    """The decoder that a Hugging Face config (the mapping of a config.json) describes, with a head.

    A family that is not known is read by the names that most configs use, as a Llama-like decoder, and
    `assumed` says so. Raises InputError that names `file` and each key that is missing or odd, and for
    what is no decoder of full or sliding-window attention.
    """
    assumed: list[str] = []
    if isinstance(config.get("text_config"), Mapping):
        assumed.append("only the language model of this config is counted")
        config = {"tie_word_embeddings": config.get("tie_word_embeddings")} | dict(config["text_config"])
    reader = ConfigReader(config, file)
    family = family_of(reader, assumed)
    hidden, heads = reader.whole("hidden_size"), reader.whole("num_attention_heads")
    kv_heads = reader.whole("num_key_value_heads", default=heads)
    if heads % kv_heads and reader.is_fine:
        reader.refuse("num_key_value_heads", f"{kv_heads} does not divide the {heads} attention heads")
    head_dim = reader.whole("head_dim", default=family.head_dim or max(1, hidden // heads))
    layers = tuple(Layer(**family.layer(reader, index)) for index in range(reader.whole("num_hidden_layers")))
    decoder = Decoder(
        model_type=family.name,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=reader.whole("vocab_size"),
        max_positions=reader.whole("max_position_embeddings"),
        layers=layers,
        tied=head == "lm" and reader.flag("tie_word_embeddings", family.tied),
        head=head,
        gated=family.gated,
        qkv_bias=reader.said(family.qkv_bias),
        out_bias=reader.said(family.out_bias),
        mlp_bias=reader.said(family.mlp_bias),
        head_norms=family.head_norms,
        layer_norms=family.layer_norms,
        norm=family.norm,
        dtype=reader.dtype(),
        assumed=tuple(assumed),
    )
    reader.finish()
    return decoder
