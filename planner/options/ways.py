"""The ways in which a call may run on a number of devices: layouts, micro-batches, slots, flags. Values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from realflow.graph.types import Call, Graph
from realflow.layout import Layout

MICRO_BATCHES = (1024, 4096, 16384)
"""Tokens of a micro-batch that are tried."""

SLOTS = (16, 64, 256)
"""Sequences that a replica decodes at once that are tried."""

FREE = ":free"
"""What the layout of an option ends in that frees its weights: it shares them with no option that keeps them,
not even with the train call's."""


@dataclass(frozen=True)
class Way:
    """How a call runs, but for where: what a `CallPlan` says beside its ranks and engine."""

    layout: Layout
    micro_batch_tokens: int = 4096
    slots: int = 32
    after: Literal["keep", "free", "offload"] = "keep"
    schedule: Literal["1f1b", "zero_bubble"] = "1f1b"
    recompute: bool = False
    sequence_parallel: bool = False

    @property
    def text(self) -> str:
        """What the search calls its layout."""
        return f"{self.layout}{FREE if self.after == 'free' else ''}"


def layout_of(text: str) -> Layout:
    """The layout behind `Way.text`."""
    return Layout.parse(text.removesuffix(FREE))


@dataclass(frozen=True)
class Wishes:
    """What a person has set of all calls; None where the search chooses."""

    micro_batch_tokens: int | None = None
    slots: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Of one call: keys of its `CallPlan`, and their values."""


def layouts(size: int, per_node: int, *, most_data: int, most_stages: int) -> Iterator[Layout]:
    """Every layout of `size` devices whose tensor groups lie inside nodes of `per_node`, with at most
    `most_data` replicas and `most_stages` stages."""
    block = min(size, per_node)
    for tensor in (t for t in range(1, block + 1) if block % t == 0 and size % t == 0):
        for stages in range(1, min(most_stages, size // tensor) + 1):
            data, rest = divmod(size, tensor * stages)
            if not rest and data <= most_data:
                yield Layout(data, tensor, stages)


def most_replicas(graph: Graph, call: Call) -> int:
    """Replicas beyond which some have nothing to do."""
    if call.op == "generate":
        return graph.prompts  # the samples of a prompt stay together: they share its prefill
    units = graph.prompts if call.whole_groups else graph.prompts * graph.samples
    return max(1, units // call.minibatches)


def ways(graph: Graph, call: Call, layout: Layout, wishes: Wishes, *, every: bool = True) -> list[Way]:
    """The ways of running a model's call with a layout, those that take no longer for less memory left out
    unless `every` is asked for."""
    if call.op == "generate":
        found: Iterable[Way] = [Way(layout, slots=n) for n in _slots(graph, layout, wishes)]
    else:
        budgets = _budgets(graph, call, layout, wishes)
        found = [Way(layout, tokens) for tokens in budgets]
    if call.op == "train":
        found = [trained for way in found for trained in _trained(way, every)]
    away = _away(graph, call)
    listed = [way for one in found for way in (one, replace(one, after=away))]
    if not wishes.flags:
        return listed
    return list(dict.fromkeys(replace(way, **wishes.flags) for way in listed))


def _trained(way: Way, every: bool) -> Iterator[Way]:
    """What a train call can do for time (stages busy) and for memory (less is kept for backward)."""
    schedules: tuple[Literal["1f1b", "zero_bubble"], ...] = ("1f1b",)
    if way.layout.pp > 1:
        schedules = ("1f1b", "zero_bubble")
    for schedule in schedules:
        plain = replace(way, schedule=schedule)
        divided = replace(plain, sequence_parallel=way.layout.tp > 1)
        if every or divided == plain:
            yield plain
        if divided != plain:
            yield divided
        if schedule == "1f1b":
            yield replace(divided, recompute=True)


def _away(graph: Graph, call: Call) -> Literal["free", "offload"]:
    """Weights of a trained model can be freed, because they come anew; those of another, and what a train
    call holds, can be put away."""
    return "free" if call.op != "train" and call.model in graph.trained() else "offload"


def _slots(graph: Graph, layout: Layout, wishes: Wishes) -> tuple[int, ...]:
    if wishes.slots is not None:
        return (wishes.slots,)
    share = -(-graph.prompts // layout.dp) * graph.samples
    return tuple(sorted({min(share, slots) for slots in SLOTS}))


def _budgets(graph: Graph, call: Call, layout: Layout, wishes: Wishes) -> tuple[int, ...]:
    """Micro-batches that differ: those beyond all of a replica's tokens are one."""
    if wishes.micro_batch_tokens is not None:
        return (wishes.micro_batch_tokens,)
    new = max((one.sampling.max_new_tokens for one in graph.calls if one.sampling), default=0)
    samples = -(-graph.prompts * graph.samples // (layout.dp * call.minibatches))
    whole = samples * (graph.data.prompt_tokens + new)
    return MICRO_BATCHES[: sum(tokens < whole for tokens in MICRO_BATCHES[:-1]) + 1]
