"""Low-rank adapters of a part of a model, in numbers: from its cut, or from a decoder's config. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from planner.decoder import Decoder
from planner.formulas.shares import shares
from planner.formulas.values import Cut
from realflow.graph.types import LoraSpec
from realflow.layout import box_size
from realflow.models.adapters import A, AdapterCut
from realflow.planfile.holdings import Holding

ALIGNMENT = 32
"""Elements of the flat buffer from one parameter's begin to another's are a multiple of it."""

FORWARD, BACKWARD = 1.1, 0.65
"""A pass with adapters on frozen weights, as a fraction of one that trains the weights: of the two products
of each linear layer backward makes one, and both have the adapters' to do. Found in seconds of one CPU thread
for SmolLM2-135M (960 tokens, bfloat16, rank 16): 1.08 and 0.59 with adapters on q and v, 1.19 and 0.67 with
adapters on all layers."""

_ROLES = {
    "q": ("q_proj",),
    "kv": ("k_proj", "v_proj"),
    "o": ("o_proj",),
    "up": ("gate_proj", "up_proj", "c_fc", "fc1"),
    "down": ("down_proj", "c_proj", "fc2"),
}


@dataclass(frozen=True)
class Low:
    """The adapters that a rank holds: of how many linear layers, of which rank; elements with what lies
    between them in memory, and those of them that are summed over tensor ranks."""

    layers: int
    rank: int
    stored: int
    partial: int = 0


def low_of(cut: AdapterCut, place: Holding) -> Low:
    """Those of a holding."""
    boxes, partial = cut.boxes(place.pp, place.tp), set(cut.partial())
    return Low(
        layers=sum(name.endswith(A) for name in boxes),
        rank=cut.spec.rank,
        stored=_stored(box_size(box) for box in boxes.values()),
        partial=sum(box_size(box) for name, box in boxes.items() if name in partial),
    )


@lru_cache(maxsize=65536)
def decoder_low(decoder: Decoder, cut: Cut, first: int, stop: int, spec: LoraSpec) -> Low:
    """Those of a stage's layers `[first, stop)`, on the tensor rank that has most."""
    layers, sizes, partial = 0, [], 0
    for kind, count in decoder.kinds(first, stop).items():
        for rows, columns, whole in _linear(decoder, kind, cut, spec):
            layers += count
            sizes += [spec.rank * columns, spec.rank * rows] * count
            partial += spec.rank * whole * count if cut.t > 1 else 0
    return Low(layers, spec.rank, _stored(sizes), partial)


def _linear(decoder: Decoder, kind: int, cut: Cut, spec: LoraSpec) -> list[tuple[int, int, int]]:
    """(rows, columns) that a rank has of each linear layer with an adapter, and how many of them its adapter
    has whole although its gradient is in parts."""
    share = shares(decoder, kind, cut)
    hidden, queries = decoder.hidden, share.heads * share.head_dim
    pairs = share.held_kv_heads * share.head_dim
    repeated = pairs if decoder.kv_heads % cut.t else 0
    found = {
        "q": (queries, hidden, hidden),
        "kv": (pairs, hidden, hidden + repeated),
        "o": (hidden, queries, hidden),
        "up": (share.columns, hidden, hidden),
        "down": (hidden, share.columns, hidden),
    }
    times = {"q": 1, "kv": 2, "o": 1, "up": 2 if decoder.gated else 1, "down": 1}
    chosen: list[tuple[int, int, int]] = []
    for role, names in _ROLES.items():
        count = sum(name in spec.targets for name in names) if spec.targets else times[role]
        chosen += [found[role]] * min(count, times[role])
    return chosen


def _stored(sizes: Iterable[int]) -> int:
    """Elements of parameters, each of which takes a multiple of `ALIGNMENT`."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
