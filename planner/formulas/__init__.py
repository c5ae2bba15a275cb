"""FLOPs, bytes of memory and bytes sent of each part of a decoder: sympy expressions, and their numbers.

`kind` is the number of a layer of the decoder (`Decoder.kinds` tells which differ); numbers are those of the
busiest rank of the cut; `itemsize` is the bytes of a weight or activation of the compute dtype.

    layer_work(decoder, kind, cut, one, phase, itemsize=2) -> Work
    layer_parts(decoder, kind, cut, one, phase, itemsize=2) -> dict[component, Work]
    ends_work(decoder, cut, one, phase, itemsize=2) -> dict["embedding" | "final_norm" | "head" | ..., Work]
    layer_traffic(decoder, kind, cut, one, phase, itemsize=2) -> tuple[Traffic, ...]
    ends_traffic(decoder, cut, one, phase, itemsize=2) -> dict["embedding" | "head", tuple[Traffic, ...]]
    stage_traffic(decoder, cut, one, phase, itemsize=2) -> Traffic     one message between neighbouring stages
    gradient_traffic(decoder, cut, first, stop, data, itemsize=2) -> tuple[Traffic, ...]  once a minibatch
    layer_elements, ends_elements, stage_elements                      parameters that a rank holds

The expressions themselves are in `planner.formulas.parts` and `planner.formulas.messages`, in the symbols of
`planner.formulas.symbols`; only those modules import sympy.
"""

from planner.formulas.numbers import (
    KEPT_LOGITS,
    ends_elements,
    ends_traffic,
    ends_work,
    expert_elements,
    gradient_traffic,
    layer_elements,
    layer_parts,
    layer_traffic,
    layer_work,
    stage_elements,
    stage_traffic,
)
from planner.formulas.shares import Shares, shares, used_kv_heads
from planner.formulas.values import (
    PHASES,
    Axis,
    Cut,
    Operation,
    Pass,
    Phase,
    Traffic,
    Work,
    decode_pass,
    pairs,
    pass_of,
)

__all__ = [
    "KEPT_LOGITS",
    "PHASES",
    "Axis",
    "Cut",
    "Operation",
    "Pass",
    "Phase",
    "Shares",
    "Traffic",
    "Work",
    "decode_pass",
    "ends_elements",
    "ends_traffic",
    "ends_work",
    "expert_elements",
    "gradient_traffic",
    "layer_elements",
    "layer_parts",
    "layer_traffic",
    "layer_work",
    "pairs",
    "pass_of",
    "shares",
    "stage_elements",
    "stage_traffic",
    "used_kv_heads",
]
