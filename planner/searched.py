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
from planner.options import Ask, Built, Models, TooLarge, build, function_ranks
from planner.options.pins import check_pins
from planner.options.refuse import refuse_call, refuse_together
from planner.options.ways import layout_of
from planner.search import (
    MOVE,
    Choice,
    Infeasible,
    Option,
    Placed,
    Slot,
    Solution,
    Work,
    evaluate,
    misfits,
    solve,
)
from planner.search import Problem as SearchProblem
from planner.search.evaluate import operations, problem_calls
from planner.searchnotes import search_notes
from realflow.errors import InputError, Problem
from realflow.graph.types import Graph
from realflow.planfile import CallPlan, Cluster, Plan, ReallocPlan, TimelineEntry, check_plan, needed_reallocs
from realflow.planfile.check import ENGINES_OF, why_not_free
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


def _tidied(problem: SearchProblem, solution: Solution) -> Solution:
    """A plan that takes no longer, in which no call takes longer than it must where it is, and none lets go
    of weights without need: what is not on the critical path, the search leaves as it happens to be."""
    best, moved = solution, {*problem.trained(), *problem.follows}
    for call in problem.calls:
        placed = best.choice[call.name]
        now = call.options[placed.option]
        for index in sorted(range(len(call.options)), key=lambda i: _wish(call.options[i])):
            option = call.options[index]
            if _wish(option) >= _wish(now):
                break
            if placed.place not in option.places or (call.model in moved and not _replaces(option, now)):
                continue
            choice = {**best.choice, call.name: Placed(index, placed.place)}
            if misfits(problem, choice) or not _names_operations(problem, choice, best.order):
                continue
            timeline = evaluate(problem, choice, best.order)
            if timeline.makespan <= best.makespan:
                best = replace(best, choice=choice, timeline=timeline, makespan=timeline.makespan)
                break
    return best


def _names_operations(problem: SearchProblem, choice: Choice, order: Sequence[Slot]) -> bool:
    """Whether a choice needs all moves that an order names: calls that come to share what they hold have one
    together."""
    needed = {MOVE + name for name in problem_calls(problem)} & operations(problem, choice).keys()
    return all(slot.what in needed for slot in order if slot.what.startswith(MOVE))


def _wish(option: Option) -> tuple[float, bool]:
    """Smaller for what is rather had, where the step takes equally long."""
    return option.duration, not option.keeps


def _replaces(option: Option, now: Option) -> bool:
    """Whether the order of a plan stays good with another option of a call: its moves come when they did, or
    no more than once a step."""
    return layout_of(option.layout) == layout_of(now.layout) and (option.keeps or not now.keeps)


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
        return built, _tidied(built.problem, solve(built.problem, seed=seed, work=work))
    except Infeasible as error:
        raise refuse_together(models, cluster, ask, error) from error


def _lacking(plan: Plan) -> dict[int, int]:
    """Rank -> bytes that its certificate lacks, for the few worst kinds of ranks."""
    return {rank: total - limit for (total, limit), ranks in overfull(plan).items() for rank in ranks}


def plan_of(models: Models, cluster: Cluster, ask: Ask, built: Built, solution: Solution) -> Plan:
    """The plan of a solution, with all that is expected of it."""
    graph = models.graph if models.graph.max_staleness else in_order(models.graph, built, solution)
    bare = Plan(
        graph,
        cluster,
        _calls(graph, cluster, built, solution),
        cards={name: models.cards[name].hash for name in graph.models if name in models.cards},
    )
    bare = _shared(bare)
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


def _calls(graph: Graph, cluster: Cluster, built: Built, solution: Solution) -> dict[str, CallPlan]:
    found = {}
    for call in graph.calls:
        placed = solution.choice[call.name]
        way = built.way(call.name, placed.option)
        ranks = tuple(placed.place)
        if call.model is None:
            ranks = tuple(range(function_ranks(graph, call, len(cluster.devices))))
        option = built.problem.call(call.name).options[placed.option]
        found[call.name] = CallPlan(
            ranks,
            way.layout,
            ENGINES_OF[call.op][0],
            micro_batch_tokens=way.micro_batch_tokens,
            slots=way.slots,
            after=way.after,
            schedule=way.schedule,
            recompute=way.recompute,
            sequence_parallel=way.sequence_parallel,
            predicted_seconds=option.seconds * (call.every or 1),
        )
    return found


def _shared(plan: Plan) -> Plan:
    """What cannot be freed, because it is what the train call holds, is put away or kept as that is."""
    calls = dict(plan.calls)
    for model, train in plan.graph.trained().items():
        for call in plan.graph.calls:
            own = calls[call.name]
            if call.model == model and own.after == "free" and why_not_free(plan, call.name) is not None:
                away = calls[train.name].after == "offload"
                calls[call.name] = replace(own, after="offload" if away else "keep")
    return replace(plan, calls=calls)


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
