"""Planning by search: from a graph on a cluster to the best plan that was found, and a proven bound.

search_plan(models, cluster, ask, work=Work(), seed=0) -> Plan
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.hardware import catalogue
from planner.make import check_amounts, check_lengths, length_notes, moves
from planner.memory import overfull, rank_memory, with_memory
from planner.options import Ask, Built, Models, TooLarge, build
from planner.options.pins import check_pins
from planner.options.refuse import refuse_call, refuse_together
from planner.search import MOVE, Infeasible, Slot, Solution, Work, evaluate, solve
from planner.searchnotes import search_notes
from planner.settled import call_plans, settled
from realflow.errors import InputError, Problem
from realflow.graph.types import Graph
from realflow.planfile import Cluster, Plan, ReallocPlan, TimelineEntry, check_plan, needed_reallocs
from realflow.planfile.notes import after_notes, idle_notes
from realflow.planfile.types import LENGTHS

ROUNDS = 6
"""Searches, each with less memory on the devices where the last plan did not fit."""


@dataclass(frozen=True)
class Searched:
    """A plan, and the problem and solution that it is of; `tighten` are the bytes that each device was taken
    to have less."""

    plan: Plan
    built: Built
    solution: Solution
    tighten: tuple[int, ...]


def search_plan(
    models: Models, cluster: Cluster, ask: Ask, *, work: Work | None = None, seed: int = 0
) -> Plan:
    """The best plan that was found for a graph on a cluster; the same seed and work give the same plan.
    Raises as `search` does."""
    return search(models, cluster, ask, work=work, seed=seed).plan


def search(
    models: Models, cluster: Cluster, ask: Ask, *, work: Work | None = None, seed: int = 0
) -> Searched:
    """The best plan that was found, and what it was found in.

    Raises InputError for what is wrong with the graph, the cluster or a pin, and where nothing fits: then
    with the binding constraint and the smallest change that would do.
    """
    graph = models.graph
    problems = [
        *check_amounts(graph, ask.wishes.micro_batch_tokens, ask.wishes.slots),
        *check_lengths(graph, {name: d.max_positions for name, d in models.decoders.items()}),
        *check_pins(models, cluster, ask),
    ]
    if problems:
        raise InputError(problems)
    tighten, bound = [0] * len(cluster.devices), math.inf
    for _ in range(ROUNDS):
        built, solution = solved(models, cluster, ask, work or Work(), seed, tighten=tighten)
        bound = min(bound, solution.bound)  # with less memory it may be above plans that fit
        solution = replace(solution, bound=bound)
        plan = plan_of(models, cluster, ask, built, solution)
        lacking = _lacking(plan)
        if not lacking:
            return Searched(plan, built, solution, tuple(tighten))
        for rank, short in lacking.items():
            tighten[rank] += short
    raise InputError(Problem(
        f"no plan was found that fits: the last one lacks {max(lacking.values()) / 2**30:.2f} GiB on rank "
        f"{max(lacking, key=lacking.__getitem__)}; give a layout (--layout) or more devices", where="memory"
    ))  # fmt: skip


def solved(
    models: Models, cluster: Cluster, ask: Ask, work: Work, seed: int = 0, *, tighten: Sequence[int] = ()
) -> tuple[Built, Solution]:
    """The problem of a graph on a cluster, and its solution. `tighten` are bytes that each device is taken to
    have less. Raises InputError where nothing fits."""
    try:
        built = build(models, cluster, ask, tighten=tighten)
    except TooLarge as error:
        raise refuse_call(models, cluster, ask, error) from error
    try:
        solution = solve(built.problem, seed=seed, work=work)
    except Infeasible as error:
        raise refuse_together(models, cluster, ask, error) from error
    return settled(models, cluster, built, solution)


def _lacking(plan: Plan) -> dict[int, int]:
    """Rank -> bytes that its certificate lacks, for the few worst kinds of ranks."""
    return {rank: total - limit for (total, limit), ranks in overfull(plan).items() for rank in ranks}


def plan_of(models: Models, cluster: Cluster, ask: Ask, built: Built, solution: Solution) -> Plan:
    """The plan of a solution, with all that is expected of it."""
    graph = models.graph if models.graph.max_staleness else in_order(models.graph, built, solution)
    bare = Plan(
        graph,
        cluster,
        call_plans(graph, cluster, built, solution),
        cards={name: models.cards[name].hash for name in graph.models if name in models.cards},
    )
    memory = rank_memory(graph, bare.calls, models.usable, cluster, ask.assume, decoders=models.decoders)
    step = max(costs.rates.constant("step").value for costs in built.costs)
    plan = with_memory(
        replace(
            bare,
            reallocs=_reallocs(models, bare, solution),
            timeline=_timeline(bare, solution),
            step_seconds=solution.makespan + step,
            lower_bound_seconds=min(solution.bound, solution.makespan) + step,
            gap=solution.gap,
            hashes=hashes(ask),
            extra={LENGTHS: built.lengths.means},
        ),
        memory,
    )
    notes = search_notes(models, cluster, built, solution)
    notes += [*idle_notes(plan), *after_notes(plan)]
    notes += length_notes(graph, {name: d.max_positions for name, d in models.decoders.items()})
    plan = replace(plan, notes=tuple(notes))
    check_plan(plan)
    return plan


def hashes(ask: Ask) -> dict[str, str]:
    """What seconds come from."""
    found = {"catalogue": catalogue().hash}
    if ask.profile is not None:
        found["profile"] = ask.profile.hash
    return found


def in_order(graph: Graph, built: Built, solution: Solution) -> Graph:
    """The graph with its calls in the order that the search found, where that matters: a run starts calls in
    the graph's order when several could start."""
    own = tuple(Slot(call.name) for call in graph.calls)
    if evaluate(built.problem, solution.choice, own).makespan <= solution.makespan * (1 + 1e-9):
        return graph
    place = {entry.what: index for index, entry in enumerate(solution.timeline.entries)}
    return replace(graph, calls=tuple(sorted(graph.calls, key=lambda call: place[call.name])))


def _timeline(plan: Plan, solution: Solution) -> tuple[TimelineEntry, ...]:
    entries = []
    for entry in solution.timeline.entries:
        ranks = tuple(rank for run in entry.devices for rank in run)
        if not ranks and entry.what in plan.calls:
            ranks = plan.calls[entry.what].ranks
        entries.append(TimelineEntry(entry.what, ranks, entry.start, entry.end))
    return tuple(entries)


def _reallocs(models: Models, plan: Plan, solution: Solution) -> tuple[ReallocPlan, ...]:
    """The moves of a step, with their bytes and seconds."""
    seconds = {
        entry.what.removeprefix(MOVE): entry.end - entry.start
        for entry in solution.timeline.entries
        if entry.what.startswith(MOVE)
    }
    if models.usable.keys() >= plan.graph.models.keys():
        found = moves(plan, models.usable)
    else:
        found = tuple(realloc for realloc, _ in needed_reallocs(plan.graph, plan.calls))
    return tuple(replace(one, predicted_seconds=_seconds_of(plan, one, seconds)) for one in found)


def _seconds_of(plan: Plan, realloc: ReallocPlan, seconds: Mapping[str, float]) -> float | None:
    """Of the move for a call, or of all moves into a follower."""
    if realloc.destination:
        return seconds.get(realloc.destination)
    own = [seconds[call.name] for call in plan.graph.calls
           if call.model == realloc.follower and call.name in seconds]  # fmt: skip
    return sum(own) if own else None
