"""Numbers of the formulas. Each expression is compiled once for each shape of layer, and is plain
arithmetic from then on (sympy is imported when the first is compiled)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from planner.decoder import Decoder
from planner.formulas.shares import shares
from planner.formulas.values import Cut, Pass, Phase, Traffic, Work

if TYPE_CHECKING:
    import sympy

    from planner.formulas.messages import Message
    from planner.formulas.parts import Cost, Part, Shape

KEPT_LOGITS = 256 * 2**20
"""Bytes of logits that training keeps for backward; more are computed again. The engine's own limit, said
again because planning imports no torch; a test compares them."""

Numbers = Callable[..., Sequence[float]]


def layer_work(decoder: Decoder, kind: int, cut: Cut, one: Pass, phase: Phase, itemsize: int = 2) -> Work:
    """What one layer computes in a pass, on the busiest rank."""
    call, given = _layer(decoder, kind, cut, phase)
    return Work(*call(*_runtime(decoder, kind, cut, one, phase), itemsize, *given))


def layer_parts(
    decoder: Decoder, kind: int, cut: Cut, one: Pass, phase: Phase, itemsize: int = 2
) -> dict[str, Work]:
    """The same by component; their sum is `layer_work`."""
    names, call = _compiled_parts(_shape(decoder, kind), "layer", phase)
    numbers = call(*_runtime(decoder, kind, cut, one, phase), itemsize, *shares(decoder, kind, cut))
    return {name: Work(*numbers[3 * i : 3 * i + 3]) for i, name in enumerate(names)}


def ends_work(decoder: Decoder, cut: Cut, one: Pass, phase: Phase, itemsize: int = 2) -> dict[str, Work]:
    """What the first stage computes before its layers (`embedding`), and the last one after them
    (`final_norm`, `head`, and of a language model `logprobs`: those of given tokens, or drawing one). In
    backward also `embedding_gradients` and `head_gradients`, and `head_again` where the logits were too
    large to keep."""
    names, call = _compiled_parts(_shape(decoder, 0), "ends", phase)
    runtime = _runtime(decoder, 0, cut, one, phase)
    given = shares(decoder, 0, cut)
    numbers = call(*runtime, itemsize, *given)
    found = {name: Work(*numbers[3 * i : 3 * i + 3]) for i, name in enumerate(names)}
    rows = runtime[4]
    if (
        phase in ("backward", "recompute")
        and decoder.head == "lm"
        and rows * given.vocab * itemsize > KEPT_LOGITS
    ):
        found["head_again"] = Work(*_again()(*runtime, itemsize, *given))
    return found


def layer_traffic(
    decoder: Decoder, kind: int, cut: Cut, one: Pass, phase: Phase, itemsize: int = 2
) -> tuple[Traffic, ...]:
    """What the ranks of one replica send each other in a layer, axes of one rank left out."""
    call, described = _compiled_messages("layer", phase, cut.sequence_parallel, _shape(decoder, kind))
    return _traffic(call, described, decoder, kind, cut, one, phase, itemsize)


def ends_traffic(
    decoder: Decoder, cut: Cut, one: Pass, phase: Phase, itemsize: int = 2
) -> dict[str, tuple[Traffic, ...]]:
    """What the tensor ranks send each other at the `embedding` and at the `head`."""
    found = {}
    for end in ("embedding", "head"):
        call, described = _compiled_messages(end, phase, cut.sequence_parallel, _shape(decoder, 0))
        found[end] = _traffic(call, described, decoder, 0, cut, one, phase, itemsize)
    return found


def stage_traffic(decoder: Decoder, cut: Cut, one: Pass, phase: Phase, itemsize: int = 2) -> Traffic:
    """One message between neighbouring stages, in either direction."""
    call, described = _compiled_messages("stage", phase, cut.sequence_parallel, _shape(decoder, 0))
    ((_, axis),) = described
    size, count = call(
        *_runtime(decoder, 0, cut, one, phase), itemsize, *shares(decoder, 0, cut), cut.t, cut.c
    )
    return Traffic("p2p", axis, cut.p, size, count)


@lru_cache(maxsize=65536)
def gradient_traffic(
    decoder: Decoder, cut: Cut, first: int, stop: int, data: int, itemsize: int = 2
) -> tuple[Traffic, ...]:
    """What the stage of layers `[first, stop)` sends once for each minibatch, on `data` data ranks.

    Float32 gradients are reduced and scattered over data and context ranks (those of experts over the
    ranks that have the same ones), and the new weights gathered; gradients that each tensor rank has a
    part of, and those of a tied table on the first and the last stage, are summed.
    """
    replicas = data * cut.c
    every = stage_elements(decoder, cut, first, stop)
    routed = sum(
        count * expert_elements(decoder, kind, cut) for kind, count in decoder.kinds(first, stop).items()
    )
    found = [
        *_reduced("dc", replicas, every - routed, itemsize),
        *_reduced("dc", max(1, replicas // cut.e), routed, itemsize),
    ]
    if cut.t > 1:
        shared = sum(
            count * _partial(decoder, kind, cut) for kind, count in decoder.kinds(first, stop).items()
        )
        if cut.sequence_parallel and stop == len(decoder.layers):
            shared += decoder.norm_size
        found += [Traffic("all_reduce", "t", cut.t, 4 * shared)] if shared else []
    if decoder.tied and cut.p > 1 and (first == 0 or stop == len(decoder.layers)):
        table = shares(decoder, 0, cut).vocab * decoder.hidden
        found.append(Traffic("all_reduce", "ends", 2, 4 * table))
    return tuple(found)


@lru_cache(maxsize=65536)
def layer_elements(decoder: Decoder, kind: int, cut: Cut) -> int:
    """Parameters of a layer that the busiest rank holds."""
    return sum(_elements(decoder, kind, cut, "layer").values())


def expert_elements(decoder: Decoder, kind: int, cut: Cut) -> int:
    """Those of its experts, which expert ranks divide among them."""
    return _elements(decoder, kind, cut, "layer").get("experts", 0)


def ends_elements(decoder: Decoder, cut: Cut) -> dict[str, int]:
    """Parameters of `embedding`, `final_norm` and `head` that the busiest rank holds; those of a tied head
    are the embedding's, held a second time by the last of several stages."""
    found = _elements(decoder, 0, cut, "ends")
    head = found["embedding"] if decoder.tied and cut.p > 1 else found["head"]
    return {"embedding": found["embedding"], "final_norm": found["final_norm"], "head": head}


@lru_cache(maxsize=65536)
def stage_elements(decoder: Decoder, cut: Cut, first: int, stop: int) -> int:
    """Parameters that a rank of the stage of layers `[first, stop)` holds, on the busiest tensor rank."""
    layers = decoder.kinds(first, stop).items()
    size = sum(layer_elements(decoder, kind, cut) * count for kind, count in layers)
    ends = ends_elements(decoder, cut)
    if first == 0:
        size += ends["embedding"]
    if stop == len(decoder.layers):
        size += ends["final_norm"] + ends["head"]
    return size


def _runtime(
    decoder: Decoder, kind: int, cut: Cut, one: Pass, phase: Phase
) -> tuple[float, float, float, float, float]:
    """Values of `symbols.RUNTIME`."""
    window = decoder.layers[kind].window
    tokens, rows = one.tokens, one.head_rows
    if phase == "decode":
        return tokens, tokens, one.seen(window) / cut.c, 0.0, rows
    context = one.context
    if window is not None and context:
        context = min(context, one.sequences * (window - 1))
    mine = tokens / cut.c
    between = mine / cut.t if cut.sequence_parallel else mine
    return mine, between, one.seen(window) / cut.c, context / cut.c, rows / cut.c


@lru_cache(maxsize=65536)
def _layer(decoder: Decoder, kind: int, cut: Cut, phase: Phase) -> tuple[Numbers, tuple[float, ...]]:
    return _compiled_layer(_shape(decoder, kind), phase), shares(decoder, kind, cut)


@lru_cache(maxsize=4096)
def _shape(decoder: Decoder, kind: int) -> Shape:
    from planner.formulas.parts import shape_of

    return shape_of(decoder, decoder.layers[kind])


def _parts(shape: Shape, where: str) -> Mapping[str, Part]:
    from planner.formulas import parts

    return parts.layer_parts(shape) if where == "layer" else parts.ends_parts(shape)


def _costs(shape: Shape, where: str, phase: Phase) -> Mapping[str, Cost]:
    from planner.formulas import parts

    return parts.layer_costs(shape, phase) if where == "layer" else parts.ends_costs(shape, phase)


@lru_cache(maxsize=256)
def _compiled_layer(shape: Shape, phase: Phase) -> Numbers:
    costs = _costs(shape, "layer", phase).values()
    return _compile([sum(getattr(cost, what) for cost in costs) for what in ("flops", "read", "written")])


@lru_cache(maxsize=256)
def _compiled_parts(shape: Shape, where: str, phase: Phase) -> tuple[tuple[str, ...], Numbers]:
    costs = _costs(shape, where, phase)
    return tuple(costs), _compile([number for cost in costs.values() for number in _three(cost)])


@lru_cache(maxsize=1)
def _again() -> Numbers:
    from planner.formulas.parts import head_again

    return _compile(_three(head_again()))


def _three(cost: Cost) -> list[sympy.Expr]:
    return [cost.flops, cost.read, cost.written]


def _compile(expressions: list[Any], extra: Sequence[Any] = ()) -> Numbers:
    import sympy

    from planner.formulas.symbols import RUNTIME, SHARES

    numbers: Numbers = sympy.lambdify([*RUNTIME, *SHARES, *extra], expressions, modules="math", cse=True)
    return numbers


@lru_cache(maxsize=256)
def _compiled_elements(shape: Shape, where: str) -> tuple[tuple[str, ...], Numbers]:
    parts = _parts(shape, where)
    return tuple(parts), _compile([part.elements for part in parts.values()])


@lru_cache(maxsize=65536)
def _elements(decoder: Decoder, kind: int, cut: Cut, where: str) -> dict[str, int]:
    names, call = _compiled_elements(_shape(decoder, kind), where)
    numbers = call(1, 1, 1, 1, 1, 1, *shares(decoder, kind, cut))
    return {name: int(number) for name, number in zip(names, numbers, strict=True)}


def _partial(decoder: Decoder, kind: int, cut: Cut) -> int:
    """Parameters of a layer that each tensor rank holds whole, with a part of their gradient."""
    found = _elements(decoder, kind, cut, "layer")
    size = found.get("head_norms", 0)
    if decoder.kv_heads % cut.t:
        size += 2 * decoder.kv_heads * decoder.head_dim * (decoder.hidden + decoder.qkv_bias)
    if cut.sequence_parallel:
        last = decoder.mlp_bias and decoder.layers[kind].intermediate > 0
        size += found["norms"] + decoder.hidden * (decoder.out_bias + last)
    return size


def _reduced(axis: Any, ranks: int, elements: int, itemsize: int) -> list[Traffic]:
    if ranks == 1 or not elements:
        return []
    return [
        Traffic("reduce_scatter", axis, ranks, 4 * elements),
        Traffic("all_gather", axis, ranks, itemsize * elements),
    ]


Described = tuple[tuple[Any, Any], ...]


@lru_cache(maxsize=256)
def _compiled_messages(where: str, phase: Phase, sequence: bool, shape: Shape) -> tuple[Numbers, Described]:
    from planner.formulas import messages
    from planner.formulas.parts import ends_in_product
    from planner.formulas.symbols import c, t

    found: tuple[Message, ...]
    if where == "layer":
        found = messages.layer_messages(
            phase, sequence=sequence, sparse=shape.sparse, skips=ends_in_product(shape)
        )
    elif where == "stage":
        found = (messages.stage_message(),)
    else:
        found = messages.ends_messages(phase, sequence=sequence, lm=shape.head == "lm")[where]
    call = _compile([x for message in found for x in (message.bytes, message.count)], (t, c))
    return call, tuple((message.operation, message.axis) for message in found)


def _traffic(
    call: Numbers,
    described: Described,
    decoder: Decoder,
    kind: int,
    cut: Cut,
    one: Pass,
    phase: Phase,
    itemsize: int,
) -> tuple[Traffic, ...]:
    ranks = {"t": cut.t, "c": cut.c, "e": cut.e}
    given = shares(decoder, kind, cut)
    numbers = call(*_runtime(decoder, kind, cut, one, phase), itemsize, *given, cut.t, cut.c)
    return tuple(
        Traffic(operation, axis, ranks[axis], numbers[2 * i], numbers[2 * i + 1])
        for i, (operation, axis) in enumerate(described)
        if ranks[axis] > 1
    )
