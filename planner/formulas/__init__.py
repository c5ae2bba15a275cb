"""FLOPs, bytes of memory and bytes sent of each part of a decoder: sympy expressions, and their numbers.

`kind` is the number of a layer of the decoder (`Decoder.kinds` tells which differ); numbers are those of the
busiest rank of the cut; `itemsize` is the bytes of a weight or activation of the compute dtype.

    layer_work(decoder, kind, cut, one, phase, itemsize=2) -> Work
    layer_parts(decoder, kind, cut, one, phase, itemsize=2) -> dict[component, Work]
    ends_work(decoder, cut, one, phase, itemsize=2) -> dict["embedding" | "final_norm" | "head", Work]
    layer_traffic(decoder, kind, cut, one, phase, itemsize=2) -> tuple[Traffic, ...]
    ends_traffic(decoder, cut, one, phase, itemsize=2) -> tuple[Traffic, ...]
    stage_traffic(decoder, cut, one, itemsize=2) -> Traffic            one message between neighbouring stages
    gradient_traffic(decoder, cut, stage, data, itemsize=2) -> tuple[Traffic, ...]       once a minibatch
    layer_elements(decoder, kind, cut) -> int                          parameters that a rank holds
    ends_elements(decoder, cut) -> dict["embedding" | "final_norm" | "head", int]
    expressions(decoder, kind, phase) -> dict[component, Expression]   what is printed
"""

from planner.formulas.values import (
    PHASES,
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
    "PHASES",
    "Cut",
    "Operation",
    "Pass",
    "Phase",
    "Traffic",
    "Work",
    "decode_pass",
    "pairs",
    "pass_of",
]
