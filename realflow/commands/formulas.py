"""`realflow explain GRAPH_OR_PLAN --formulas`: what is counted for each part of each model, and the numbers
for the layouts of a plan."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from planner.decoder import Decoder, Layer, read_decoder, stage_cuts
from planner.formulas import (
    Cut,
    Pass,
    Phase,
    Traffic,
    Work,
    decode_pass,
    ends_traffic,
    ends_work,
    gradient_traffic,
    layer_parts,
    layer_traffic,
    pass_of,
    stage_traffic,
)
from planner.lengths import Lengths, read_lengths
from realflow.commands.runs import looks_like_plan
from realflow.errors import InputError, Problem
from realflow.graph import find_graph, load_graph
from realflow.graph.types import Call, Graph
from realflow.models.card import ITEMSIZE
from realflow.models.paths import resolve_model
from realflow.planfile import CallPlan, read_plan

if TYPE_CHECKING:
    import sympy

    from planner.formulas.messages import Message
    from planner.formulas.parts import Cost

_PLAIN_WIDTH = 120  # of a pipe or file, which has no width of its own
_AXES = {"t": "tensor", "c": "context", "e": "expert", "p": "neighbouring"}
_SHOWN: tuple[Phase, ...] = ("forward", "backward", "decode")


def render_formulas(
    given: str, overrides: Sequence[str], at: str | None = None, console: Console | None = None
) -> None:
    """Print the expressions of every model of a graph or a plan; of a plan also the numbers of its calls, and
    with a layout `at` (such as d2t2c4e8) those of every call in that one.

    Raises InputError where a file or the layout is wrong, or a model is not known.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, _PLAIN_WIDTH)
    graph, calls = _read(given, overrides)
    decoders = {name: decoder_of(graph, name) for name in graph.models}
    shown = {name: _placed(call) for name, call in calls.items()}
    if at is not None:
        place = parse_cut(at, decoders)
        shown = {call.name: replace(shown.get(call.name, place), data=place.data, cut=place.cut)
                 for call in graph.calls}  # fmt: skip
    for decoder, names in _alike(decoders).items():
        for part in expressions(decoder, names):
            console.print(part)
    for part in symbols():
        console.print(part)
    if shown:
        for part in numbers(graph, shown, decoders):
            console.print(part)


@dataclass(frozen=True)
class Placed:
    """How a call runs, as far as costs go: `data` replicas of a cut model."""

    cut: Cut
    data: int = 1
    tokens: int = CallPlan.micro_batch_tokens
    slots: int = CallPlan.slots
    recompute: bool = False

    def __str__(self) -> str:
        sizes = {"d": self.data, "t": self.cut.t, "p": self.cut.p, "c": self.cut.c, "e": self.cut.e}
        return "".join(f"{letter}{size}" for letter, size in sizes.items() if letter in "dtp" or size > 1)


def parse_cut(text: str, decoders: Mapping[str, Decoder]) -> Placed:
    """Read a layout with any of the letters d, t, p, c and e, for these models.

    Raises InputError for anything else, and where a model has too few layers, heads or experts.
    """
    if not re.fullmatch(r"(?:[dtpce][1-9]\d{0,5})+", text) or len(set(text) & set("dtpce")) < len(
        re.findall("[a-z]", text)
    ):
        raise InputError(
            Problem(f"{text!r} is no layout; expected letters of d, t, p, c, e with sizes, such as d2t4c2",
                    where="--cut")
        )  # fmt: skip
    sizes = {letter: int(digits) for letter, digits in re.findall(r"([a-z])(\d+)", text)}
    data, t, p, c, e = (sizes.get(letter, 1) for letter in "dtpce")
    cut = Cut(t, p, c, e)
    for name, decoder in decoders.items():
        limits = {"p": (cut.p, len(decoder.layers), "layers"), "t": (cut.t, decoder.heads, "heads")}
        if decoder.sparse:
            limits["e"] = (cut.e, max(layer.experts for layer in decoder.layers), "experts")
        for letter, (size, limit, what) in limits.items():
            if size > limit:
                raise InputError(
                    Problem(f"{name} has {limit} {what}; use {letter}1 to {letter}{limit}", where="--cut")
                )
    if (data * cut.c) % cut.e:
        message = f"e{cut.e} must divide the {data * cut.c} data and context ranks, which share the experts"
        raise InputError(Problem(message, where="--cut"))
    return Placed(cut, data)


def decoder_of(graph: Graph, name: str) -> Decoder:
    """The decoder of a graph's model, from its config."""
    spec = graph.models[name]
    file = resolve_model(spec.path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(Problem(f"is not JSON ({error})", file=str(file))) from error
    if not isinstance(config, dict):
        raise InputError(Problem("holds no JSON object", file=str(file)))
    return read_decoder(config, spec.head, str(file))


def _read(given: str, overrides: Sequence[str]) -> tuple[Graph, Mapping[str, CallPlan]]:
    """A graph, or that of a plan and how its calls run."""
    if not looks_like_plan(given):
        return load_graph(find_graph(given), list(overrides)), {}
    if overrides:
        raise InputError(Problem("a plan has no params to set; edit the file, or give a graph", where=given))
    plan = read_plan(given)
    return plan.graph, plan.calls


def _placed(call: CallPlan) -> Placed:
    layout = call.layout
    cut = Cut(t=layout.tp, p=layout.pp, sequence_parallel=call.sequence_parallel)
    return Placed(cut, layout.dp, call.micro_batch_tokens, call.slots, call.recompute)


def _alike(decoders: Mapping[str, Decoder]) -> dict[Decoder, list[str]]:
    found: dict[Decoder, list[str]] = {}
    for name, decoder in decoders.items():
        found.setdefault(decoder, []).append(name)
    return found


def expressions(decoder: Decoder, names: Sequence[str]) -> Iterable[RenderableType]:
    """What the models of these names, which are alike, compute and send."""
    from planner.formulas import messages, parts

    yield Text(f"{' and '.join(names)}: {_described(decoder)}", style="bold")
    for note in decoder.assumed:
        yield Text(f"note: {note}", style="yellow")
    for kind, count in decoder.kinds().items():
        layer = decoder.layers[kind]
        shape = parts.shape_of(decoder, layer)
        for phase in _SHOWN:
            title = f"{count} layers: {_kind(layer)}; {phase}"
            yield _costs(title, parts.layer_costs(shape, phase))
    shape = parts.shape_of(decoder, decoder.layers[0])
    for phase in _SHOWN:
        yield _costs(f"Before and after the layers; {phase}", parts.ends_costs(shape, phase))
    rows = []
    for sequence in (False, True):
        for phase in _SHOWN[: 2 if sequence else 3]:
            layer_found = messages.layer_messages(phase, sequence=sequence, sparse=decoder.sparse)
            ends = messages.ends_messages(phase, sequence=sequence, lm=decoder.head == "lm")
            told = f"{phase}{', sequence parallel' if sequence else ''}"
            for where, found in (("a layer", layer_found), *ends.items()):
                rows += [(told, where, *_message(one)) for one in found if not sequence or one.axis == "t"]
    stage = messages.stage_message()
    rows.append(("forward, backward and decode", "between stages", *_message(stage)))
    columns = ("phase", "where", "what", "ranks", "bytes of one", "times")
    yield _table("Messages (between ranks of one replica)", columns, rows)


def symbols() -> Iterable[RenderableType]:
    """What the symbols mean."""
    from planner.formulas import symbols as known

    rows = []
    divided = known.meanings(sequence_parallel=True)
    decoding = known.meanings(decode=True)
    for symbol, meaning in known.meanings().items():
        value = "" if meaning.value is None else _plain(meaning.value)
        for others, when in ((divided, "sequence parallel"), (decoding, "decode")):
            other = others[symbol].value
            if other is not None and other != meaning.value:
                value += f"; {when}: {_plain(other)}"
        rows.append((str(symbol), meaning.text, value))
    yield _table("Where, on the busiest rank", ("symbol", "what", "value"), rows)
    yield Text(
        "Backward with recompute is backward and forward together, without a layer's last product where\n"
        "nothing needs it again. c and e (context and expert ranks) are costed; no engine runs them yet."
    )


def numbers(
    graph: Graph, calls: Mapping[str, Placed], decoders: Mapping[str, Decoder]
) -> Iterable[RenderableType]:
    """What each call computes and sends in one pass, on its busiest rank."""
    lengths = read_lengths(graph)
    yield Text(f"In numbers: {lengths.note}.", style="bold")
    for call in graph.calls:
        if call.model is None:
            continue
        decoder, itemsize = decoders[call.model], ITEMSIZE[graph.models[call.model].dtype]
        step = step_of(call, calls[call.name], decoder, lengths)
        yield _numbers(step, decoder, itemsize)
        yield Text(_sent(step, decoder, itemsize))


@dataclass(frozen=True)
class Step:
    """One pass of a call, on its busiest stage: `[first, stop)` of the layers."""

    title: str
    placed: Placed
    one: Pass
    phases: tuple[Phase, ...]
    first: int
    stop: int


def step_of(call: Call, placed: Placed, decoder: Decoder, lengths: Lengths) -> Step:
    """The pass whose numbers are shown: a micro-batch of sequences of mean length, or a decoding step in
    the midst of the responses."""
    phases: tuple[Phase, ...] = ("forward",)
    if call.op == "generate":
        phases, context = ("decode",), lengths.prompt + lengths.response / 2
        one = decode_pass([(context, placed.slots)], decoder.windows)
        what = f"decoding {placed.slots} sequences of {context:.0f} tokens"
    else:
        length = max(1.0, lengths.prompt + lengths.response)
        one = pass_of([(length, max(1.0, placed.tokens / length))], decoder.windows)
        what = f"a micro-batch of {one.tokens:.0f} tokens in sequences of {length:.0f}"
    if call.op == "train":
        phases = ("forward", "recompute" if placed.recompute else "backward")
    stages = [Step("", placed, one, phases, *run) for run in stage_cuts(decoder, placed.cut.p)]
    busiest = max(stages, key=lambda step: sum(work.flops for work in _parts(step, decoder, 2).values()))
    where = f"{call.name} ({call.op}, {placed}), layers {busiest.first} to {busiest.stop - 1}"
    return replace(busiest, title=f"{where}: {what}")


def _parts(step: Step, decoder: Decoder, itemsize: int) -> dict[str, Work]:
    """Each part's work on the busiest rank of a stage, over its layers."""
    found: dict[str, Work] = {}
    cut, last = step.placed.cut, len(decoder.layers)
    for phase in step.phases:
        for kind, count in decoder.kinds(step.first, step.stop).items():
            for name, work in layer_parts(decoder, kind, cut, step.one, phase, itemsize).items():
                found[name] = found.get(name, Work()) + work * count
        for name, work in ends_work(decoder, cut, step.one, phase, itemsize).items():
            if step.first == 0 if name.startswith("embedding") else step.stop == last:
                found[name] = found.get(name, Work()) + work
    return found


def _numbers(step: Step, decoder: Decoder, itemsize: int) -> Table:
    found = _parts(step, decoder, itemsize)
    found["together"] = sum(found.values(), Work())
    rows = [
        (name, _amount(work.flops), _amount(work.read), _amount(work.written)) for name, work in found.items()
    ]
    title = f"{step.title}; {' and '.join(step.phases)}"
    return _table(title, ("part", "FLOPs", "bytes read", "bytes written"), rows, right=True)


def _sent(step: Step, decoder: Decoder, itemsize: int) -> str:
    """What the busiest rank sends, by axis."""
    cut, one = step.placed.cut, step.one
    found: dict[str, float] = {}

    def add(traffic: Iterable[Traffic], times: int = 1, label: str = "") -> None:
        for item in traffic:
            key = label or f"to {_AXES[item.axis]} ranks"
            found[key] = found.get(key, 0.0) + item.sent * times

    for phase in step.phases:
        for kind, count in decoder.kinds(step.first, step.stop).items():
            add(layer_traffic(decoder, kind, cut, one, phase, itemsize), count)
        ends = ends_traffic(decoder, cut, one, phase, itemsize)
        add(ends["embedding"] if step.first == 0 else ())
        add(ends["head"] if step.stop == len(decoder.layers) else ())
        if cut.p > 1:
            add([stage_traffic(decoder, cut, one, phase, itemsize)])
    if len(step.phases) > 1:
        traffic = gradient_traffic(decoder, cut, step.first, step.stop, step.placed.data, itemsize)
        add(traffic, label="gradients and new weights, once a minibatch,")
    told = ", ".join(f"{label} {_amount(size)}" for label, size in found.items())
    return f"bytes sent: {told or 'none'}"


def _described(decoder: Decoder) -> str:
    parts = [
        f"{decoder.model_type}, {len(decoder.layers)} layers, {decoder.size:,} parameters",
        f"hidden {decoder.hidden}",
        f"{decoder.heads} heads and {decoder.kv_heads} of keys and values, of {decoder.head_dim}",
        f"{decoder.vocab:,} token ids",
        f"{decoder.head} head{' (tied)' if decoder.tied else ''}",
    ]
    return "; ".join(parts)


def _kind(layer: Layer) -> str:
    attention = "full attention" if layer.window is None else f"attention within {layer.window} tokens"
    if not layer.experts:
        return f"{attention}, MLP of {layer.intermediate} columns"
    shared = f", {layer.shared_columns} columns for every token" if layer.shared_columns else ""
    columns = layer.expert_columns
    return f"{attention}, {layer.active} of {layer.experts} experts of {columns} columns{shared}"


def _costs(title: str, costs: Mapping[str, Cost]) -> Table:
    rows = [
        (name, _plain(cost.flops), _plain(cost.read), _plain(cost.written)) for name, cost in costs.items()
    ]
    return _table(title, ("part", "FLOPs", "bytes read", "bytes written"), rows)


def _message(one: Message) -> tuple[str, str, str, str]:
    return one.operation, one.axis, _plain(one.bytes), _plain(one.count)


def _plain(expression: sympy.Expr) -> str:
    """An expression as text: factors with dots between, powers with ^."""
    import sympy

    found: Any = sympy.sympify(expression)
    if found.is_polynomial():
        found = sympy.factor(found)
    return str(found).replace("**", "^").replace("*", "·")


def _amount(number: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        min_width=min(len(title) + 2, _PLAIN_WIDTH),
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if right and index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
