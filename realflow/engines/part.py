"""What of a model one rank decodes: its layers, its heads, its token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from realflow.engines.kv_cache import CacheShape
from realflow.errors import InputError
from realflow.models.partition import Partition, Stage
from realflow.models.place import Place
from realflow.models.supported import ATTENTION_KINDS
from realflow.models.tensor import Region

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class HoldsPart(Protocol):
    """A model as `realflow.models` loads it. Its logits are `head @ states` and nothing else."""

    @property
    def module(self) -> PreTrainedModel:
        """The Hugging Face causal LM, or what this rank has of it. All parameters that it has lie in one
        storage, or at least move together."""

    @property
    def place(self) -> Place:
        """Where this rank stands."""

    @property
    def partition(self) -> Partition:
        """How the model is cut."""

    @property
    def stage(self) -> Stage:
        """The layers of this rank."""

    @property
    def region(self) -> Region:
        """Where its modules communicate with those of other tensor ranks."""


@dataclass(frozen=True)
class Heads:
    """The attention heads of one rank.

    Query head h of a model reads key and value head h // `group`. A rank has `query` consecutive
    query heads; it computes `computed` key and value heads, and its query heads read those of
    `[kept[0], kept[1])`. In the grid of the kept heads with `group` places each, the query heads
    begin at place `first`.
    """

    query: int
    computed: int
    kept: tuple[int, int]
    group: int
    first: int

    @property
    def cached(self) -> int:
        """Key and value heads that are stored."""
        return self.kept[1] - self.kept[0]

    @property
    def fill_grid(self) -> bool:
        """Whether every place of the grid has a query head."""
        return self.query == self.cached * self.group

    @classmethod
    def of(cls, heads: int, kv_heads: int, query: tuple[int, int], computed: tuple[int, int]) -> Heads:
        """Those of a rank that has query heads and computes key and value heads in these ranges."""
        group = heads // kv_heads
        lowest, highest = query[0] // group, -(-query[1] // group)
        assert computed[0] <= lowest < highest <= computed[1], (query, computed, group)
        return cls(
            query=query[1] - query[0],
            computed=computed[1] - computed[0],
            kept=(lowest - computed[0], highest - computed[0]),
            group=group,
            first=query[0] - lowest * group,
        )


def heads_of(model: HoldsPart) -> Heads:
    """The heads of this rank's part of a model."""
    cut, tp = model.partition, model.place.tp.index
    return Heads.of(cut.card.heads, cut.card.kv_heads, cut.query_heads(tp), cut.kv_heads(tp))


def cache_shape(model: HoldsPart, slots: int, length: int) -> CacheShape:
    """The cache that a rank needs. Raises InputError where the model cannot be decoded this way."""
    module = model.module
    config = module.config.get_text_config()
    name = type(module).__name__
    strange = set(getattr(config, "layer_types", None) or ()) - ATTENTION_KINDS
    if strange or not getattr(module, "_supports_attention_backend", False):
        found = f"layers of type {', '.join(sorted(strange))}" if strange else "attention of its own"
        raise InputError(f"model {name} has {found}; native generation needs full or sliding attention")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(
            f"generation: max_length {length} is more than the {limit} positions of model {name}; "
            "shorten prompts or max_new_tokens"
        )
    _check_rope(config, length, name)
    return CacheShape(
        layers=model.stage.stop - model.stage.first,
        slots=slots,
        kv_heads=heads_of(model).cached,
        length=length,
        head_dim=model.partition.card.head_dim,
        first_layer=model.stage.first,
    )


def dtype_of(module: torch.nn.Module) -> tuple[torch.dtype, torch.device]:
    """What a model computes in, and where."""
    parameter = next(module.parameters())
    return parameter.dtype, parameter.device


def _check_rope(config: Any, length: int, name: str) -> None:
    """Refuse rotary embeddings that depend on the longest sequence of a batch, where they would."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = part.get("rope_type")
        original = part.get("original_max_position_embeddings") or config.max_position_embeddings
        if kind in _LENGTH_DEPENDENT_ROPE and length > original:
            raise InputError(
                f"model {name}: rope type {kind} beyond {original} positions makes a sample depend on the "
                f"others in its batch; set max_length (now {length}) to at most {original}"
            )
