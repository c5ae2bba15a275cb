"""How a model is cut over tensor and pipeline ranks: which boxes, heads and layers each rank holds. Pure.

Everything follows from the card: the model's own `tp_plan` says which modules are cut along rows or
columns, its `pp_plan` where the layers are. Ours are the cuts that the plans lack: attention at
whole heads (uneven where heads do not divide), key and value heads whole on every rank where they
do not divide, embedding and head along the vocabulary, stages of equal cost.

What cannot be cut is refused with the reason and the sizes that would work.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from realflow.errors import InputError, Problem
from realflow.layout import Box, DeviceMesh, Layout, cut, full_box
from realflow.models.card import Card, Parameter

COLUMN, ROW, HEAD, EMBEDDING = "colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"
SUMMED = "replicated_with_grad_allreduce"
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_KEY_VALUE = ("k_proj", "v_proj")
_LAYER = re.compile(r"^(?P<list>.+?)\.(?P<index>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage computes: layers `[first, stop)`; `embeds` on the first stage, `ends`
    (final norm and head) on the last."""

    index: int
    first: int
    stop: int
    embeds: bool
    ends: bool


@dataclass(frozen=True)
class Partition:
    """A model cut over `tp` tensor ranks and `pp` stages (the same for every data-parallel replica).

    Every rank holds one box of each parameter of its stage. A tied embedding is held by the first
    and by the last stage.
    """

    card: Card
    tp: int
    pp: int
    stages: tuple[Stage, ...]

    @property
    def shares_kv(self) -> bool:
        """Whether every tensor rank holds all key and value heads, because they do not divide."""
        return self.card.kv_heads % self.tp != 0

    def query_heads(self, tp: int) -> tuple[int, int]:
        """`[start, stop)` of the query heads of a tensor rank; never empty."""
        return cut(self.card.heads, self.tp, tp)

    def kv_heads(self, tp: int) -> tuple[int, int]:
        """`[start, stop)` of the key and value heads that a tensor rank holds."""
        return (0, self.card.kv_heads) if self.shares_kv else cut(self.card.kv_heads, self.tp, tp)

    def kv_picks(self, tp: int) -> tuple[int, ...] | None:
        """Which of the held key and value heads a tensor rank's query heads use; None: all, as they are.

        The picked heads divide the rank's query heads evenly: query head i (counted on the rank) uses
        `picks[i // (query heads // len(picks))]`.
        """
        if self.tp == 1 or not self.shares_kv:
            return None
        groups = self.card.heads // self.card.kv_heads
        picks = [head // groups for head in range(*self.query_heads(tp))]
        once = sorted(set(picks))
        if len(picks) == len(once) * picks.count(once[0]) and len({picks.count(head) for head in once}) == 1:
            return tuple(once)
        return tuple(picks)

    def vocabulary(self, tp: int) -> tuple[int, int]:
        """`[start, stop)` of the token ids whose rows of embedding and head a tensor rank holds."""
        return cut(self.card.vocab, self.tp, tp)

    def boxes(self, pp: int, tp: int) -> dict[str, Box]:
        """The box of every parameter that the rank at (pp, tp) holds, in the card's order."""
        stage = self.stages[pp]
        return {p.name: self._box(p, tp) for p in self.card.parameters if self._holds(stage, p.name)}

    @property
    def layer_list(self) -> str:
        """The module that holds the layers, such as `model.layers`."""
        return next(match["list"] for p in self.card.parameters if (match := _LAYER.match(p.name)))

    def modules(self, style: str, pp: int) -> tuple[str, ...]:
        """The modules of a stage whose weights have a tensor style (`COLUMN`, `ROW`, `EMBEDDING`)."""
        held = (p.name for p in self.card.parameters if self._holds(self.stages[pp], p.name))
        return tuple(dict.fromkeys(n.rpartition(".")[0] for n in held if self._styles[n] == style))

    def holders(self, mesh: DeviceMesh) -> dict[str, list[tuple[int, Box]]]:
        """Parameter -> `(rank, box)` of every rank of a mesh whose layout has these `tp` and `pp`."""
        assert (mesh.layout.tp, mesh.layout.pp) == (self.tp, self.pp), (mesh.layout, self.tp, self.pp)
        held = {(pp, tp): self.boxes(pp, tp) for pp in range(self.pp) for tp in range(self.tp)}
        found: dict[str, list[tuple[int, Box]]] = {p.name: [] for p in self.card.parameters}
        for rank in mesh.ranks:
            place = mesh.coordinate(rank)
            for name, box in held[place["pp"], place["tp"]].items():
                found[name].append((rank, box))
        return found

    def is_whole(self, name: str) -> bool:
        """Whether every tensor rank holds all of a parameter (its gradient counts once in a norm)."""
        return self.cut_dim(name) is None

    def cut_dim(self, name: str) -> int | None:
        """The dim along which tensor ranks divide a parameter; None where each holds all of it."""
        return None if self.tp == 1 else self._dim(name)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The full shapes of all parameters."""
        return {p.name: p.shape for p in self.card.parameters}

    def partial(self, *, sequence: bool = False) -> tuple[str, ...]:
        """Parameters, sorted, that every tensor rank holds whole but whose gradient each rank has only
        a part of: they are summed over tp once a step.

        Norms of heads and shared key and value heads are used with each rank's own query heads; with
        `sequence` (sequence parallelism) everything between the blocks sees each rank's own tokens.
        """
        if self.tp == 1:
            return ()
        whole = [p.name for p in self.card.parameters if self.is_whole(p.name)]
        return tuple(sorted(name for name in whole if self._is_partial(name, sequence)))

    @property
    def tied(self) -> tuple[str, ...]:
        """Parameters that the first and the last stage both hold: their gradients are summed over the
        two once a step."""
        return tuple(sorted(self._tied)) if self.pp > 1 else ()

    @cached_property
    def _styles(self) -> dict[str, str]:
        return {p.name: style_of(self.card, p.name) for p in self.card.parameters}

    @cached_property
    def _tied(self) -> frozenset[str]:
        return frozenset(self.card.tied.values())

    def _dim(self, name: str) -> int | None:
        """The dim of a parameter that is cut over tp, None where it is held whole."""
        style, leaf = self._styles[name], name.rpartition(".")[2]
        if style in (EMBEDDING, HEAD):
            return 0
        if style == COLUMN:
            return None if self.shares_kv and module_of(name) in _KEY_VALUE else 0
        return 1 if style == ROW and leaf == "weight" else None

    def _box(self, parameter: Parameter, tp: int) -> Box:
        box = list(full_box(parameter.shape))
        dim = self._dim(parameter.name) if self.tp > 1 else None
        if dim is None:
            return tuple(box)
        module = module_of(parameter.name)
        if module in _KEY_VALUE:
            start, stop = self.kv_heads(tp)
            box[dim] = (start * self.card.head_dim, stop * self.card.head_dim)
        elif module == "q_proj" or (module == "o_proj" and dim == 1):
            start, stop = self.query_heads(tp)
            box[dim] = (start * self.card.head_dim, stop * self.card.head_dim)
        else:
            box[dim] = cut(parameter.shape[dim], self.tp, tp)
        return tuple(box)

    def _is_partial(self, name: str, sequence: bool) -> bool:
        if self._styles[name] == SUMMED or module_of(name) in _KEY_VALUE:
            return True
        return sequence and not name.startswith(HEAD_NAME)

    def _holds(self, stage: Stage, name: str) -> bool:
        layer = _LAYER.match(name)
        if layer:
            return stage.first <= int(layer["index"]) < stage.stop
        if is_embedding(self.card, name):
            return stage.embeds or (stage.ends and name in self._tied)
        return stage.ends


HEAD_NAME = "score."
"""The linear head of value and reward models: held whole by every tensor rank of the last stage."""


def partition(card: Card, layout: Layout) -> Partition:
    """Cut a model for a layout.

    Raises InputError where the model cannot be cut that way, naming the reason and what would work.
    """
    problems = list(_refusals(card, layout))
    if problems:
        raise InputError(problems)
    return Partition(card, layout.tp, layout.pp, stages(card, layout.pp))


def with_head(card: Card, head: str) -> Card:
    """The card of a model with another head: `lm` as it is; `value` and `reward` have, instead of the
    language-model head, a linear `score.weight` [1, hidden] as in Hugging Face's sequence classifiers."""
    if head == "lm":
        return card
    output = next((name for name, style in card.tensor_styles.items() if style == HEAD), "lm_head")
    kept = [p for p in card.parameters if not p.name.startswith(f"{output}.")]
    dtype = card.parameters[0].dtype
    return replace(
        card,
        parameters=(*kept, Parameter(f"{HEAD_NAME}weight", (1, card.hidden), dtype)),
        tied={alias: owner for alias, owner in card.tied.items() if not alias.startswith(f"{output}.")},
        unsupported_head="",
    )


def stages(card: Card, count: int) -> tuple[Stage, ...]:
    """Cut the layers into `count` runs, so that the slowest stage, final norm and head included, is as
    fast as can be. A stage's time is taken as the parameters that each of its tokens is multiplied
    with; looking up an embedding costs one row."""
    layers = [0.0] * card.layers
    first, last = float(card.hidden), 0.0
    for parameter in card.parameters:
        layer = _LAYER.match(parameter.name)
        if layer:
            layers[int(layer["index"])] += parameter.size
        elif not is_embedding(card, parameter.name) or parameter.name in card.tied.values():
            last += parameter.size
    ends = balanced(layers, count, first, last)
    starts = (0, *ends[:-1])
    return tuple(
        Stage(index, start, stop, index == 0, index == count - 1)
        for index, (start, stop) in enumerate(zip(starts, ends, strict=True))
    )


def style_of(card: Card, name: str) -> str:
    """The tensor style of a parameter: its module's in the model's plan, that of an embedding where
    the plan leaves a vocabulary-wide input embedding out, else empty (held whole)."""
    module = name.rpartition(".")[0]
    for pattern, style in card.tensor_styles.items():
        if fnmatch.fnmatchcase(module, pattern):
            return style
    return EMBEDDING if is_embedding(card, name) else ""


def module_of(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return name.rsplit(".", 2)[-2] if name.count(".") > 1 else name.split(".")[0]


def is_embedding(card: Card, name: str) -> bool:
    """Whether a parameter is the table that token ids are looked up in."""
    module = name.rpartition(".")[0]
    return any(module == entry and "input_ids" in io[0] for entry, io in card.pipeline_styles.items()) or (
        not card.pipeline_styles and module.endswith("embed_tokens")
    )


def balanced(layers: list[float], count: int, first: float, last: float) -> tuple[int, ...]:
    """Ends of `count` runs, none empty, with the least largest sum (exact: dynamic programming)."""
    total = [0.0]
    for size in layers:
        total.append(total[-1] + size)

    def cost(start: int, stop: int, index: int) -> float:
        extra = (first if index == 0 else 0.0) + (last if index == count - 1 else 0.0)
        return total[stop] - total[start] + extra

    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # layers taken -> (largest sum, ends)
    for index in range(count):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (worst, ends) in best.items():
            for stop in range(start + 1, len(layers) - (count - 1 - index) + 1):
                found = (max(worst, cost(start, stop, index)), (*ends, stop))
                if stop not in reached or found[0] < reached[stop][0]:
                    reached[stop] = found
        best = reached
    return best[len(layers)][1]


def _refusals(card: Card, layout: Layout) -> Iterator[Problem]:
    problem = card.unsupported or card.unsupported_head
    if problem:
        yield Problem(problem, where="model")
    if layout.pp > card.layers:
        yield Problem(
            f"{card.architecture} has {card.layers} layers; p{layout.pp} needs at least {layout.pp}: "
            f"use p1 to p{card.layers}",
            where="layout",
        )
    if layout.pp > 1 and not card.pipeline_styles:
        yield Problem(
            f"{card.architecture} publishes no pipeline plan (pp_plan) that its layers keep to, so that "
            f"they cannot be divided into stages: use p1",
            where="layout",
        )
    if layout.tp > 1:
        yield from _tensor_refusals(card, layout.tp)


def _tensor_refusals(card: Card, tp: int) -> Iterator[Problem]:
    """Why a model cannot be cut over `tp` ranks."""

    def refuse(reason: str) -> Problem:
        return Problem(f"{card.architecture}: {reason}", where="layout")

    if not card.tensor_styles:
        yield refuse("publishes no tensor plan (tp_plan), so its layers cannot be cut: use t1")
        return
    limits = {"attention heads": card.heads, "columns of its MLP": card.intermediate, "token ids": card.vocab}
    for what, limit in limits.items():
        if tp > limit:
            yield refuse(
                f"it has {limit} {what}; t{tp} needs at least {tp}: use t1 to t{min(limits.values())}"
            )
    problem = _style_problem(card) or _block_problem(card)
    if problem:
        yield refuse(f"{problem}: use t1")


def _style_problem(card: Card) -> str | None:
    """A tensor style that is not known where it stands."""
    for parameter in card.parameters:
        style, module = style_of(card, parameter.name), parameter.name.rpartition(".")[0]
        inside = _LAYER.match(parameter.name) is not None
        if style not in ((COLUMN, ROW, SUMMED, "") if inside else (HEAD, EMBEDDING, "")):
            return f"its tensor plan has the style {style!r} (at {module}), which is not supported"
    return None


def _block_problem(card: Card) -> str | None:
    """What cannot be cut about a block: the layers that a column- or row-parallel one stands beside."""
    blocks: dict[str, dict[str, Parameter]] = {}
    for parameter in card.parameters:
        module, _, leaf = parameter.name.rpartition(".")
        parent, _, name = module.rpartition(".")
        if style_of(card, parameter.name) in (COLUMN, ROW) and leaf == "weight":
            blocks.setdefault(parent, {})[name] = parameter
    for parent, parts in blocks.items():
        problem = _unusual(card, parent, parts)
        if problem:
            return f"{parent} {problem}"
    for parameter in card.parameters:
        style, inside = style_of(card, parameter.name), parameter.name.rpartition(".")[0].rpartition(".")[0]
        if style == SUMMED and (inside not in blocks or parameter.shape != (card.head_dim,)):
            return f"{parameter.name} is to be summed, but is no norm of heads"
        if style == "" and any(parameter.name.startswith(f"{parent}.") for parent in blocks):
            return f"{parameter.name} stands among cut layers, but has no place in the tensor plan"
        if style == "" and _LAYER.match(parameter.name) and len(parameter.shape) > 1:
            return f"{parameter.name} has no place in the tensor plan"
    return None


def _unusual(card: Card, parent: str, parts: Mapping[str, Parameter]) -> str | None:
    """What is unusual about a block with these column- and row-parallel weights."""
    columns = {name: p.shape[0] for name, p in parts.items() if style_of(card, p.name) == COLUMN}
    rows = {name: p.shape[1] for name, p in parts.items() if style_of(card, p.name) == ROW}
    names = ", ".join(sorted(parts))
    if not columns or len(rows) != 1 or _LAYER.match(parent) is None:
        return f"has parts ({names}) that are no block of column- and row-parallel layers"
    if set(columns) & set(_ATTENTION):
        if set(columns) != set(_ATTENTION) or set(rows) != {"o_proj"}:
            return f"has attention of other parts than q_proj, k_proj, v_proj and o_proj ({names})"
        queries, pairs = card.heads * card.head_dim, card.kv_heads * card.head_dim
        found = (columns["q_proj"], columns["k_proj"], columns["v_proj"], rows["o_proj"])
        if found != (queries, pairs, pairs, queries):
            return f"has q, k, v and o of {found} columns; expected {queries} and {pairs}, in whole heads"
    elif any(word in name for name in columns for word in ("query", "qkv", "attn")):
        return f"has fused attention parts ({names}), which cannot be cut at heads"
    elif set(columns.values()) != set(rows.values()):
        return f"has fused or unequal parts ({names}), which cannot be cut alike"
    return None
