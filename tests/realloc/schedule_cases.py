"""Layouts to make schedules of: a small model in every layout, its flat masters, and random ones."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, product
from random import Random

from realflow.layout import Box, DeviceMesh, Layout, cut, flat_boxes, full_box
from realflow.models.card import Card, Parameter
from realflow.models.partition import partition
from realflow.realloc import Tensors, TensorSpec

LAYOUTS = [Layout(d, t, p) for d, t, p in product(range(1, 9), repeat=3) if d * t * p <= 8]
RELATIONS = ("same", "overlapping", "disjoint")
NODES = {rank: f"n{rank // 4}" for rank in range(16)}


def small_card() -> Card:
    """A tied model in which nothing divides: 9 heads, 3 key-value heads, odd sizes, 8 layers."""
    heads, kv, width, hidden, ffn, vocabulary = 9, 3, 4, 36, 50, 101
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(8):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (heads * width, hidden),
            f"{at}self_attn.k_proj.weight": (kv * width, hidden),
            f"{at}self_attn.k_proj.bias": (kv * width,),
            f"{at}self_attn.v_proj.weight": (kv * width, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, heads * width),
            f"{at}mlp.up_proj.weight": (ffn, hidden),
            f"{at}mlp.down_proj.weight": (hidden, ffn),
            f"{at}input_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    return Card(
        hash="0" * 16,
        architecture="LlamaForCausalLM",
        model_type="llama",
        parameters=tuple(Parameter(name, shape, "bfloat16") for name, shape in shapes.items()),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        layers=8,
        hidden=hidden,
        intermediate=ffn,
        heads=heads,
        kv_heads=kv,
        head_dim=width,
        vocab=vocabulary,
        max_positions=64,
        tensor_styles={
            "model.layers.*.self_attn.q_proj": "colwise",
            "model.layers.*.self_attn.k_proj": "colwise",
            "model.layers.*.self_attn.v_proj": "colwise",
            "model.layers.*.self_attn.o_proj": "rowwise",
            "model.layers.*.mlp.up_proj": "colwise",
            "model.layers.*.mlp.down_proj": "rowwise",
            "model.embed_tokens": "embedding_rowwise",
            "lm_head": "colwise_gather_output",
        },
        pipeline_styles={
            "model.embed_tokens": (("input_ids",), ("inputs_embeds",)),
            "model.layers": (("hidden_states",), ("hidden_states",)),
            "model.norm": (("hidden_states",), ("hidden_states",)),
        },
    )


@cache
def weights(layout: Layout, first: int = 0) -> Tensors:
    """The model under a layout on ranks from `first` on; bfloat16."""
    card = small_card()
    mesh = DeviceMesh(tuple(range(first, first + layout.size)), layout)
    held = partition(card, layout).holders(mesh)
    return {p.name: TensorSpec(p.shape, 2, tuple(held[p.name])) for p in card.parameters}


@cache
def masters(layout: Layout, first: int = 0) -> Tensors:
    """Its float32 masters: what a (pp, tp) coordinate holds is one flat buffer, in equal parts over dp."""
    card = small_card()
    cuts = partition(card, layout)
    mesh = DeviceMesh(tuple(range(first, first + layout.size)), layout)
    found: dict[str, list[tuple[int, Box]]] = {p.name: [] for p in card.parameters}
    for pp, tp in product(range(layout.pp), range(layout.tp)):
        boxes = cuts.boxes(pp, tp)
        sizes = {name: [stop - start for start, stop in box] for name, box in boxes.items()}
        total = sum(_product(lengths) for lengths in sizes.values())
        offset = 0
        for name, box in boxes.items():
            for dp in range(layout.dp):
                low, high = (
                    min(max(edge - offset, 0), _product(sizes[name])) for edge in cut(total, layout.dp, dp)
                )
                for part in flat_boxes(sizes[name], low, high):
                    moved = tuple((lo + a, lo + b) for (lo, _), (a, b) in zip(box, part, strict=True))
                    found[name].append((mesh.rank_at(pp=pp, dp=dp, tp=tp), moved))
            offset += _product(sizes[name])
    return {p.name: TensorSpec(p.shape, 4, tuple(found[p.name])) for p in card.parameters}


def first_rank(relation: str, source: Layout, destination: Layout) -> int:
    """Where the destination's ranks begin if the source's are from 0 on."""
    if relation == "same":
        return 0
    return source.size if relation == "disjoint" else max(1, min(source.size, destination.size) // 2)


def random_pair(draw: Random) -> tuple[Tensors, Tensors, dict[int, str] | None]:
    """Two layouts of a few tensors on up to 64 ranks: uneven, replicated, several boxes a rank, several
    nodes. The source holds everything at least once."""
    count = draw.choice([2, 3, 5, 8, 12, 24, 64])
    nodes = None
    if draw.random() < 0.8:
        size = draw.choice([1, 2, 3, 4, 8])
        nodes = {rank: f"n{rank // size}" for rank in range(count)}
        if draw.random() < 0.3:  # ranks and nodes in no order
            names = [*nodes.values()]
            draw.shuffle(names)
            nodes = dict(enumerate(names))
    src, dst = {}, {}
    for index in range(draw.randint(1, 5)):
        shape = tuple(draw.randint(1, 24) for _ in range(draw.randint(0, 3)))
        there, here = draw.choice([(2, 2), (4, 4), (4, 2), (2, 4), (8, 2)])
        holders = _holders(draw, shape, count)
        holders += [(draw.randrange(count), _any_box(draw, shape)) for _ in range(draw.choice([0, 0, 1, 3]))]
        wanted = _holders(draw, shape, count)
        if draw.random() < 0.3:
            wanted = [item for item in wanted if draw.random() < 0.6]
        src[f"w{index}"] = TensorSpec(shape, there, tuple(holders))
        dst[f"w{index}"] = TensorSpec(shape, here, tuple(wanted))
    return src, dst, nodes


def _holders(draw: Random, shape: tuple[int, ...], count: int) -> list[tuple[int, Box]]:
    """A tensor cut into boxes, each held by some ranks; no rank holds an element twice."""
    ranks = draw.sample(range(count), draw.randint(1, count))
    kind = draw.choice(["whole", "grid", "flat", "ragged"])
    if kind == "whole":
        return [(rank, full_box(shape)) for rank in ranks]
    total = _product(shape)
    if kind == "flat":
        copies = draw.randint(1, min(3, len(ranks)))
        held = []
        for copy in range(copies):
            group = ranks[copy::copies]
            edges = [0, *sorted(draw.randint(0, total) for _ in group[1:]), total]
            for rank, (low, high) in zip(group, pairwise(edges), strict=True):
                held += [(rank, box) for box in flat_boxes(shape, low, high)]
        return held
    boxes = [full_box(shape)]
    if kind == "grid":
        for dim, size in enumerate(shape):
            parts = draw.randint(1, min(4, size))
            boxes = [(*b[:dim], cut(size, parts, i), *b[dim + 1 :]) for b in boxes for i in range(parts)]
    else:
        for _ in range(draw.randint(0, 6)):
            boxes += _halves(draw, boxes.pop(draw.randrange(len(boxes))))
    return [
        (rank, box)
        for box in boxes
        for rank in draw.sample(ranks, draw.choice([1, 1, min(2, len(ranks)), len(ranks)]))
    ]


def _halves(draw: Random, box: Box) -> list[Box]:
    dims = [dim for dim, (start, stop) in enumerate(box) if stop - start > 1]
    if not dims:
        return [box]
    dim = draw.choice(dims)
    middle = draw.randint(box[dim][0] + 1, box[dim][1] - 1)
    return [
        (*box[:dim], (box[dim][0], middle), *box[dim + 1 :]),
        (*box[:dim], (middle, box[dim][1]), *box[dim + 1 :]),
    ]


def _any_box(draw: Random, shape: tuple[int, ...]) -> Box:
    edges = (sorted((draw.randint(0, size), draw.randint(0, size))) for size in shape)
    return tuple((low, high) for low, high in edges)


def _product(lengths: tuple[int, ...] | list[int]) -> int:
    total = 1
    for length in lengths:
        total *= length
    return total
