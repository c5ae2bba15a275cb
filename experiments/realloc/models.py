"""Two models in shapes, and pairs of layouts that a reallocation of `bench.py` goes between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from realflow.layout import Box, DeviceMesh, Layout, box_size, lengths
from realflow.models.card import Card, Parameter
from realflow.models.partition import partition
from realflow.realloc import Tensors, TensorSpec
from realflow.realloc.storage import Storage

_CUTS = {
    "q_proj": "colwise",
    "k_proj": "colwise",
    "v_proj": "colwise",
    "o_proj": "rowwise",
    "gate_proj": "colwise",
    "up_proj": "colwise",
    "down_proj": "rowwise",
}


def llama(layers: int, hidden: int, heads: int, kv: int, ffn: int, vocabulary: int, tied: bool) -> Card:
    """The card of a Llama of that size, bfloat16."""
    width = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (kv * width, hidden),
            f"{at}self_attn.v_proj.weight": (kv * width, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}mlp.gate_proj.weight": (ffn, hidden),
            f"{at}mlp.up_proj.weight": (ffn, hidden),
            f"{at}mlp.down_proj.weight": (hidden, ffn),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    modules = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in _CUTS}
    modules["up_proj"] = modules["down_proj"] = modules["gate_proj"] = "mlp"
    styles = {f"model.layers.*.{modules[name]}.{name}": style for name, style in _CUTS.items()}
    states = ("hidden_states",)
    return Card(
        hash="0" * 16,
        architecture="LlamaForCausalLM",
        model_type="llama",
        parameters=tuple(Parameter(name, shape, "bfloat16") for name, shape in shapes.items()),
        tied={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        layers=layers,
        hidden=hidden,
        intermediate=ffn,
        heads=heads,
        kv_heads=kv,
        head_dim=width,
        vocab=vocabulary,
        max_positions=2048,
        tensor_styles={
            **styles,
            "model.embed_tokens": "embedding_rowwise",
            "lm_head": "colwise_gather_output",
        },
        pipeline_styles={
            "model.embed_tokens": (("input_ids",), ("inputs_embeds",)),
            "model.layers": (states, states),
            "model.norm": (states, states),
        },
    )


MODELS = {
    "smollm2": llama(30, 576, 9, 3, 1536, 49152, tied=True),  # SmolLM2-135M
    "1b": llama(22, 2048, 32, 4, 5632, 32000, tied=False),  # 1.1 · 10⁹ parameters
}


Held = Mapping[str, Sequence[Storage]]
PRIME = 16381  # the largest that leaves no NaN among the bits of bfloat16


@dataclass(frozen=True)
class Pair:
    """A model's weights under two layouts."""

    name: str
    src: Tensors
    dst: Tensors


def pairs(card: Card, ranks: int) -> Iterator[Pair]:
    """d -> t, p -> d, t -> p, d·t -> d on all ranks, and p -> d from one half of them to the other."""

    def pair(one: Layout, other: Layout, first: int = 0) -> Pair:
        where = " on other ranks" if first else ""
        return Pair(f"{one} -> {other}{where}", weights(card, one, 0), weights(card, other, first))

    d, t, p = Layout(ranks, 1, 1), Layout(1, ranks, 1), Layout(1, 1, ranks)
    yield pair(d, t)
    yield pair(p, d)
    yield pair(t, p)
    if ranks >= 4:
        yield pair(Layout(ranks // 2, 2, 1), d)
        yield pair(Layout(1, 1, ranks // 2), Layout(ranks // 2, 1, 1), ranks // 2)


def weights(card: Card, layout: Layout, first: int) -> Tensors:
    """The model under a layout on ranks from `first` on."""
    mesh = DeviceMesh(tuple(range(first, first + layout.size)), layout)
    held = partition(card, layout).holders(mesh)
    return {p.name: TensorSpec(p.shape, 2, tuple(held[p.name])) for p in card.parameters}


def boxes_of(specs: Tensors, rank: int) -> dict[str, Box]:
    """The one box of each parameter that a rank holds."""
    found = {}
    for name, spec in specs.items():
        for holder, box in spec.holders:
            if holder == rank:
                found[name] = box
    return found


def allocate(specs: Tensors, rank: int) -> dict[str, list[Storage]]:
    """A rank's part of the weights, in one flat buffer."""
    boxes = boxes_of(specs, rank)
    flat = torch.empty(sum(map(box_size, boxes.values())), dtype=torch.bfloat16)
    held: dict[str, list[Storage]] = {}
    at = 0
    for name, box in boxes.items():
        strides = torch.empty(lengths(box), device="meta").stride()
        held[name] = [Storage(box, flat, at, strides, flat.dtype)]
        at += box_size(box)
    return held


def fill(held: Held, specs: Tensors) -> None:
    """Numbers that say which element of which parameter they are."""
    for name, bound in held.items():
        for storage in bound:
            storage.view().copy_(expected(name, storage.box, specs))


def right(held: Held, specs: Tensors) -> bool:
    """Whether every element is what `fill` writes."""
    return all(
        torch.equal(storage.view(), expected(name, storage.box, specs))
        for name, bound in held.items()
        for storage in bound
    )


def buffers(held: Held) -> list[torch.Tensor]:
    """The flat buffers in which the boxes lie, each once."""
    return list({id(one.tensor): one.tensor for bound in held.values() for one in bound}.values())


def expected(name: str, box: Box, specs: Tensors) -> torch.Tensor:
    """bfloat16 of the box's shape; its bits are the elements' numbers modulo a prime, moved by the name."""
    first, offsets = sum(name.encode()), torch.zeros(1, dtype=torch.int64)
    *outer, (start, stop) = box
    for (low, high), size in zip(outer, specs[name].shape[1:], strict=True):
        offsets = ((offsets.view(-1, 1) + torch.arange(low, high)) * size).view(-1)
    numbers = (torch.arange(PRIME + stop - start) % PRIME).to(torch.int16)
    rows = numbers.unfold(0, stop - start, 1)[(offsets + first + start) % PRIME]
    return rows.view(lengths(box)).view(torch.bfloat16)
