"""Layouts of two large models: a dense one and a mixture of experts. Shapes only, no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from realflow.layout import Box, cut, full_box
from realflow.realloc.specs import TensorSpec

RANKS_PER_NODE = 8

Shapes = dict[str, tuple[int, ...]]
_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_COLUMNS = ("o_proj", "down_proj")


def llama_70b(layers: int = 80) -> Shapes:
    """Llama 3 70B: 80 layers (or fewer), hidden 8192, 64 heads and 8 key-value heads, FFN 28672, untied."""
    hidden, ffn, vocabulary = 8192, 28672, 128256
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (hidden // 8, hidden),
            f"{at}self_attn.v_proj.weight": (hidden // 8, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}mlp.gate_proj.weight": (ffn, hidden),
            f"{at}mlp.up_proj.weight": (ffn, hidden),
            f"{at}mlp.down_proj.weight": (hidden, ffn),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def dense_layout(shapes: Shapes, layers: int, dp: int, tp: int, pp: int) -> dict[str, TensorSpec]:
    """A dense model under d×t×p on ranks 0.., ordered pp, dp, tp; bfloat16."""
    specs = {}
    for name, shape in shapes.items():
        stage = _stage(name, layers, pp)
        holders = tuple(
            ((stage * dp + d) * tp + t, _tensor_box(name, shape, tp, t))
            for d, t in product(range(dp), range(tp))
        )
        specs[name] = TensorSpec(shape, 2, holders)
    return specs


def _stage(name: str, layers: int, pp: int) -> int:
    """The pipeline stage of a parameter: layers in equal parts, the rest at the ends."""
    parts = name.split(".")
    if parts[1] == "layers":
        layer = int(parts[2])
        return next(stage for stage in range(pp) if layer < cut(layers, pp, stage)[1])
    return 0 if parts[1] == "embed_tokens" else pp - 1


def _tensor_box(name: str, shape: Sequence[int], tp: int, t: int) -> Box:
    kind = name.split(".")[-2]
    if kind in _ROWS:
        return (cut(shape[0], tp, t), *full_box(shape[1:]))
    if kind in _COLUMNS:
        return (*full_box(shape[:-1]), cut(shape[-1], tp, t))
    return full_box(shape)


LAYERS, EXPERTS, HIDDEN, WIDTH = 61, 384, 7168, 2048


def moe_1t(stacked: bool) -> Shapes:
    """A mixture of 61 layers × 384 experts of 3 matrices each: 1.03 · 10¹² parameters."""
    shapes: Shapes = {"model.embed_tokens.weight": (163840, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_a_proj.weight": (1536, HIDDEN),
            f"{at}self_attn.q_b_proj.weight": (12288, 1536),
            f"{at}self_attn.kv_a_proj.weight": (576, HIDDEN),
            f"{at}self_attn.kv_b_proj.weight": (16384, 512),
            f"{at}self_attn.o_proj.weight": (HIDDEN, 8192),
            f"{at}mlp.gate.weight": (EXPERTS, HIDDEN),
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
        }
        shapes |= dict(_experts(f"{at}mlp.experts.", stacked))
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (163840, HIDDEN)}


def _experts(at: str, stacked: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    matrices = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    for matrix, shape in matrices.items():
        if stacked:
            yield f"{at}{matrix}", (EXPERTS, *shape)
        else:
            yield from ((f"{at}{expert}.{matrix}.weight", shape) for expert in range(EXPERTS))


def moe_layout(shapes: Shapes, ranks: int, pp: int, ep: int) -> dict[str, TensorSpec]:
    """pp stages of ranks // pp ranks; each `ep` of these hold all experts once, and all hold the rest."""
    each = ranks // pp
    owner = [group for group in range(ep) for _ in range(*cut(EXPERTS, ep, group))]
    specs = {}
    for name, shape in shapes.items():
        first = _stage(name, LAYERS, pp) * each
        if ".experts." not in name:
            holders = tuple((first + i, full_box(shape)) for i in range(each))
        elif len(shape) == 3:
            holders = tuple(
                (first + i, (cut(EXPERTS, ep, i % ep), *full_box(shape[1:]))) for i in range(each)
            )
        else:
            group = owner[int(name.split(".")[-3])]
            holders = tuple((first + i, full_box(shape)) for i in range(group, each, ep))
        specs[name] = TensorSpec(shape, 2, holders)
    return specs


def nodes(ranks: int) -> dict[int, str]:
    """Eight ranks on each node."""
    return {rank: f"n{rank // RANKS_PER_NODE}" for rank in range(ranks)}
