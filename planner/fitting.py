"""The smallest change that would make a plan fit into memory. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from planner.memory import Assumptions, overfull, rank_memory, with_memory
from realflow.graph.types import Call
from realflow.layout import Layout
from realflow.models.card import Card
from realflow.models.layouts import accepted, refusals
from realflow.models.partition import with_head
from realflow.planfile import CallPlan, Plan
from realflow.planfile.check import why_not_free
from realflow.planfile.ranks import format_ranks

LEAST_TOKENS, LEAST_SLOTS = 128, 1
"""No fewer tokens of a micro-batch, and slots, are proposed."""

Change = tuple[str, Mapping[str, CallPlan]]
"""What changes, in words, and the calls with it."""

Slots = Callable[[Call, Layout], int]
"""How many slots a generate call should have under a layout."""


def memory_notes(plan: Plan, cards: Mapping[str, Card], assume: Assumptions, slots: Slots) -> list[str]:
    """For each kind of rank that is expected not to fit: the call, the cause, and what would fit."""
    found = overfull(plan)
    notes = [_misfit(plan, total, limit, ranks) for (total, limit), ranks in found.items()]
    if not found:
        return notes
    change = smallest_change(plan, cards, assume, slots)
    notes.append(f"Memory: {change} is expected to fit." if change else _hopeless(plan))
    return notes


def smallest_change(plan: Plan, cards: Mapping[str, Card], assume: Assumptions, slots: Slots) -> str | None:
    """The first change that makes all ranks fit, of those that cost little before those that cost more; None
    where none does."""
    for words, calls in _changes(plan, cards, slots):
        memory = rank_memory(plan.graph, calls, cards, plan.cluster, assume)
        if not overfull(with_memory(replace(plan, calls=calls), memory)):
            return words
    return None


def _misfit(plan: Plan, total: int, limit: int, ranks: list[int]) -> str:
    many = len(ranks) > 1
    cause, size = max(plan.memory[ranks[0]].items(), key=lambda item: item[1])
    moment = plan.moments.get(ranks[0])
    return (
        f"Memory: rank{'s' * many} {format_ranks(ranks)} {'are' if many else 'is'} expected to need "
        f"{total / 2**30:.1f} GiB of {'their' if many else 'its'} {limit / 2**30:.3g} GiB"
        f"{f' at {moment}' if moment else ''}, most of it {cause} ({size / 2**30:.1f} GiB)."
    )


def _hopeless(plan: Plan) -> str:
    short = max(total - limit for total, limit in overfull(plan))
    return (
        f"Memory: no smaller micro-batch, fewer slots, recompute, offload or other layout alone fits; "
        f"{short / 2**30:.1f} GiB more for each device would, or more devices."
    )


def _changes(plan: Plan, cards: Mapping[str, Card], slots: Slots) -> Iterator[Change]:
    """Changes of one call at the worst moments, then of all calls together."""
    ranks = [ranks[0] for ranks in overfull(plan).values()]
    moments = {name for rank in ranks for name in plan.moments.get(rank, "").split(" beside ")}
    worst = [call for call in plan.graph.calls if call.model and call.name in moments]
    for call in worst:
        yield from _smaller(plan, call)
    for call in worst:
        if call.op == "train" and not plan.calls[call.name].recompute:
            yield from _one(plan, call, "recompute", recompute=True)
    for call in plan.graph.calls:
        if call.model and plan.calls[call.name].after == "keep":
            if why_not_free(plan, call.name) is None:
                yield from _one(plan, call, "free", after="free")
            yield from _one(plan, call, "offload", after="offload")
    if worst and not all(plan.calls[call.name].recompute for call in worst if call.op == "train"):
        train = {c.name: replace(plan.calls[c.name], recompute=True) for c in worst if c.op == "train"}
        every = {
            call.name: replace(plan.calls[call.name], micro_batch_tokens=LEAST_TOKENS)
            for call in worst
            if call.op != "generate"
        }
        both = {name: replace(where, recompute=name in train) for name, where in every.items()}
        yield f"{LEAST_TOKENS} tokens a micro-batch and recompute for {_names(both)}", {**plan.calls, **both}
    yield from _layouts(plan, cards, slots)


def _smaller(plan: Plan, call: Call) -> Iterator[Change]:
    where = plan.calls[call.name]
    if call.op == "generate":
        count = where.slots // 2
        while count >= LEAST_SLOTS:
            yield from _one(plan, call, f"{count} slots", slots=count)
            count //= 2
        return
    tokens = where.micro_batch_tokens // 2
    while tokens >= LEAST_TOKENS:
        yield from _one(plan, call, f"{tokens} tokens a micro-batch", micro_batch_tokens=tokens)
        tokens //= 2


def _one(plan: Plan, call: Call, words: str, **values: object) -> Iterator[Change]:
    changed = replace(plan.calls[call.name], **values)  # type: ignore[arg-type]
    yield f"{words} for {call.name}", {**plan.calls, call.name: changed}


def _layouts(plan: Plan, cards: Mapping[str, Card], slots: Slots) -> Iterator[Change]:
    """Layouts of all devices, the same for every call of a model: those most like data parallelism first."""
    world = plan.world_size
    models = [with_head(cards[name], spec.head) for name, spec in plan.graph.models.items()]
    for layout in accepted(models[0], world) if models else ():
        if any(refusals(card, layout) for card in models[1:]):
            continue
        calls = {
            call.name: plan.calls[call.name]
            if call.op == "function"
            else CallPlan(
                tuple(range(world)),
                layout,
                plan.calls[call.name].engine,
                plan.calls[call.name].micro_batch_tokens,
                slots(call, layout),
            )
            for call in plan.graph.calls
        }
        yield f"{layout} for all calls", calls


def _names(calls: Mapping[str, CallPlan]) -> str:
    return " and ".join(calls)
