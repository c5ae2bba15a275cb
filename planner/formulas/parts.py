"""What each part of a decoder computes: sympy expressions in the symbols of `planner.formulas.symbols`.

A product of x [rows, inputs] with weights [inputs, outputs] is 2 rows inputs outputs FLOPs; it reads both
and writes the result. Backward has two such products (the gradient of x, and that of the weights, which is
added into a float32 buffer of the same shape). Attention's scores stay on the chip, as in fused kernels,
whose backward computes them again. Everything between products is counted as reading its inputs and
writing its outputs once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import sympy as sp

from planner.decoder import Decoder, Layer
from planner.formulas.symbols import D, E, F, H, L, S, V, X, b, e, g, h, k, m, n, r, s, u, y
from planner.formulas.values import Phase

WIDE = 4
"""Bytes of a number of the gradient buffer."""

ZERO = sp.Integer(0)


@dataclass(frozen=True)
class Cost:
    """FLOPs, and bytes read and written."""

    flops: sp.Expr = ZERO
    read: sp.Expr = ZERO
    written: sp.Expr = ZERO

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class Part:
    """One part: the parameters that a rank holds of it, and what it costs. `decode` is `forward` unless
    given. `again` says whether backward with recompute computes its forward again."""

    elements: sp.Expr
    forward: Cost
    backward: Cost
    decode: Cost | None = None
    again: bool = True

    def cost(self, phase: Phase) -> Cost:
        """What it costs in a phase, without the adding up of gradients."""
        if phase == "forward":
            return self.forward
        if phase == "decode":
            return self.decode or self.forward
        return self.backward + self.forward if phase == "recompute" and self.again else self.backward


class Shape(NamedTuple):
    """What of a decoder decides which formulas its layers of one kind have."""

    gated: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool
    layer_norms: int
    norm_numbers: int
    dense: bool
    sparse: bool
    shared: bool
    shared_gate: bool
    head: str
    tied: bool


def shape_of(decoder: Decoder, layer: Layer) -> Shape:
    """The shape of a layer's formulas."""
    return Shape(
        gated=decoder.gated,
        qkv_bias=decoder.qkv_bias,
        out_bias=decoder.out_bias,
        mlp_bias=decoder.mlp_bias,
        head_norms=decoder.head_norms,
        layer_norms=decoder.layer_norms,
        norm_numbers=2 if decoder.norm == "layer" else 1,
        dense=layer.intermediate > 0,
        sparse=layer.experts > 0,
        shared=layer.shared_columns > 0,
        shared_gate=layer.shared_gate,
        head=decoder.head,
        tied=decoder.tied,
    )


def ends_in_product(shape: Shape) -> bool:
    """Whether a layer ends with the MLP's last product, added to the residual: nothing of backward needs
    its result, so that it is not computed (nor summed over tensor ranks) again."""
    return shape.layer_norms == 2 and shape.dense and not shape.shared


def layer_costs(shape: Shape, phase: Phase) -> Mapping[str, Cost]:
    """What each part of a layer costs; in backward `gradients` adds those of all parameters up."""
    parts = layer_parts(shape)
    costs = {name: cost for name, part in parts.items() for cost in [part.cost(phase)] if cost != Cost()}
    if phase in ("backward", "recompute"):
        costs["gradients"] = _adding(sum((part.elements for part in parts.values()), ZERO))
    return costs


def ends_costs(shape: Shape, phase: Phase) -> Mapping[str, Cost]:
    """What comes before the layers and after them costs (only layers are computed again)."""
    parts = ends_parts(shape)
    again: Phase = "backward" if phase == "recompute" else phase
    costs = {name: part.cost(again) for name, part in parts.items()}
    if again == "backward":
        head = V * H if shape.head == "lm" else parts["head"].elements
        costs["embedding_gradients"] = _adding(parts["embedding"].elements)
        costs["head_gradients"] = _adding(head + parts["final_norm"].elements)
    return costs


def _adding(elements: sp.Expr) -> Cost:
    """Adding gradients in the compute dtype into their float32 buffer."""
    return Cost(elements, elements * (b + WIDE), elements * WIDE)


def product(rows: sp.Expr, inputs: sp.Expr, outputs: sp.Expr, bias: bool = False) -> Part:
    """x [rows, inputs] times weights [inputs, outputs]."""
    weights = inputs * outputs + (outputs if bias else ZERO)
    return Part(
        elements=weights,
        forward=Cost(2 * rows * inputs * outputs, (weights + rows * inputs) * b, rows * outputs * b),
        backward=Cost(
            4 * rows * inputs * outputs,
            (weights + rows * inputs + 2 * rows * outputs) * b,
            (weights + rows * inputs) * b,
        ),
    )


def elementwise(
    numbers: sp.Expr, flops: int, inputs: int = 1, outputs: int = 1, elements: sp.Expr = ZERO
) -> Part:
    """So many `flops` for each of `numbers`, from `inputs` tensors of that size to `outputs`. Backward reads
    the inputs and the outputs' gradients, and writes the inputs' gradients, at twice the FLOPs."""
    return Part(
        elements=elements,
        forward=Cost(flops * numbers, (inputs * numbers + elements) * b, outputs * numbers * b),
        backward=Cost(
            2 * flops * numbers,
            ((inputs + outputs) * numbers + elements) * b,
            (inputs * numbers + elements) * b,
        ),
    )


def layer_parts(shape: Shape) -> Mapping[str, Part]:
    """The parts of a decoder layer, in the order of its forward pass. (`scores_again`: fused attention does
    not keep its scores for backward.)"""
    parts = {
        "norms": _norms(shape.layer_norms, shape),
        "qkv": product(n, H, (h + 2 * g) * D, shape.qkv_bias),
        "rotary": elementwise(n * (h + g) * D, 3),
        "scores": _scores(),
        "softmax": Part(ZERO, Cost(5 * s * h), Cost(5 * s * h)),
        "scores_again": Part(ZERO, Cost(), Cost(2 * s * h * D), again=False),
        "out": product(n, h * D, H, shape.out_bias),
        "residuals": elementwise(2 * y * H, 1, inputs=2),
    }
    if shape.head_norms:
        parts["head_norms"] = elementwise(n * (h + g) * D, 4, elements=2 * D)
    if shape.dense:
        parts |= _mlp("", n, F, shape)
        if ends_in_product(shape):
            parts["down"] = replace(parts["down"], again=False)
    if shape.sparse:
        parts |= _experts(shape)
    if shape.shared:
        plain = shape._replace(mlp_bias=False)
        parts |= _mlp("shared_", n, S, plain)
        if shape.shared_gate:
            parts["shared_gate"] = product(n, H, sp.Integer(1))
    return parts


def ends_parts(shape: Shape) -> Mapping[str, Part]:
    """What comes before the layers and after them."""
    table = V * H
    logits = r * V
    parts = {
        "embedding": Part(
            table,
            Cost(ZERO, n * H * b, n * H * b),
            # The gradient is one of the whole table.
            Cost(n * H, n * H * b, (table + n * H) * b),
        ),
        "final_norm": _norms(1, shape),
    }
    if shape.head != "lm":
        return parts | {"head": product(r, H, sp.Integer(1))}
    head = product(r, H, V)
    parts["head"] = Part(ZERO if shape.tied else table, head.forward, head.backward)
    parts["logprobs"] = Part(
        ZERO, Cost(5 * logits, logits * b, r * WIDE), Cost(6 * logits, logits * b, logits * b)
    )
    return parts


def head_again() -> Cost:
    """What backward computes again where the logits were too large to keep."""
    return product(r, H, V).forward


def _norms(count: int, shape: Shape) -> Part:
    return elementwise(count * y * H, 4 * shape.norm_numbers, elements=count * H * shape.norm_numbers)


def _scores() -> Part:
    """Queries with keys, and probabilities with values: 2 pairs D each for every query head. Backward has
    four such products."""
    queries, pairs_read = n * h * D, 2 * u * D
    forward = Cost(4 * s * h * D, (queries + (n + m) * pairs_read) * b, queries * b)
    backward = Cost(
        8 * s * h * D, (3 * queries + (n + m) * pairs_read) * b, (queries + (n + m) * pairs_read) * b
    )
    decode = Cost(4 * s * h * D, (queries + s * pairs_read) * b, (queries + n * pairs_read) * b)
    return Part(ZERO, forward, backward, decode)


def _mlp(prefix: str, rows: sp.Expr, columns: sp.Expr, shape: Shape) -> dict[str, Part]:
    factor = 2 if shape.gated else 1
    return {
        f"{prefix}{'gate_up' if shape.gated else 'up'}": product(rows, H, factor * columns, shape.mlp_bias),
        f"{prefix}activation": elementwise(rows * columns, 5, inputs=factor),
        f"{prefix}down": product(rows, columns, H, shape.mlp_bias),
    }


def _experts(shape: Shape) -> dict[str, Part]:
    """Router, the experts of a rank for the tokens of all e ranks (n k token-expert pairs when the
    router is balanced), and the weighted sum of their outputs.

    Of the E experts n e tokens, each with k different ones, touch E (1 - (1 - k / E)^(n e)) on average;
    only their weights are read.
    """
    products = 3 if shape.gated else 2
    factor = products - 1
    routed, weights = n * k, products * H * X
    touched = L * (1 - (1 - k / E) ** (n * e))
    inside = routed * (H + (factor + 1) * X)
    experts = Part(
        elements=L * weights,
        forward=Cost(2 * routed * weights, (touched * weights + inside) * b, inside * b),
        backward=Cost(4 * routed * weights, (touched * weights + 2 * inside) * b, (L * weights + inside) * b),
    )
    return {
        "router": product(n, H, E),
        "experts": experts,
        "combine": Part(
            ZERO,
            Cost(2 * routed * H, routed * H * b, n * H * b),
            Cost(2 * routed * H, (routed + n) * H * b, routed * H * b),
        ),
    }
