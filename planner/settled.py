"""What a solution's calls do, made definite: none slower than it need be, none that lets go of weights that
nothing would bring again.

settled(models, cluster, built, solution) -> (Built, Solution)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.decoderparts import option_bytes
from planner.hardware import node_device
from planner.meshes import pools
from planner.options import Built, Meaning, Models, function_ranks
from planner.options.ways import Way, layout_of
from planner.search import MOVE, Choice, Option, Placed, Problem, Slot, Solution, evaluate, misfits
from planner.search.evaluate import is_kept, needs, operations, problem_calls
from realflow.graph.types import Call, Graph
from realflow.planfile import CallPlan, Cluster, Plan
from realflow.planfile.check import ENGINES_OF, why_not_free


def settled(models: Models, cluster: Cluster, built: Built, solution: Solution) -> tuple[Built, Solution]:
    """The solution that a plan is made of: its seconds are those of the plan. The problem has the options of
    calls that run otherwise than the search had them beside its own."""
    return _shared(models, cluster, built, tidied(built.problem, solution))


# ---- no slower than need be ------------------------------------------------------------------------


def tidied(problem: Problem, solution: Solution) -> Solution:
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


def _names_operations(problem: Problem, choice: Choice, order: Sequence[Slot]) -> bool:
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


# ---- what cannot be freed --------------------------------------------------------------------------


def _shared(models: Models, cluster: Cluster, built: Built, solution: Solution) -> tuple[Built, Solution]:
    """What cannot be freed, because it is what the train call holds, is put away or kept as that is. The
    solution's seconds are those with it so."""
    graph = models.graph
    plan = Plan(graph, cluster, call_plans(graph, cluster, built, solution), cards={})
    problem, meanings, choice = built.problem, dict(built.meanings), dict(solution.choice)
    for model, train in graph.trained().items():
        for call in graph.calls:
            free = call.model == model and plan.calls[call.name].after == "free"
            if not free or why_not_free(plan, call.name) is None:
                continue
            away = plan.calls[train.name].after == "offload"
            meaning = meanings[call.name][choice[call.name].option]
            way = replace(meaning.way, after="offload" if away else "keep")
            own = problem.call(call.name)
            option = _otherwise(models, cluster, built, call, replace(meaning, way=way),
                                own.options[choice[call.name].option])  # fmt: skip
            changed = replace(own, options=(*own.options, option))
            calls = tuple(changed if one is own else one for one in problem.calls)
            problem = replace(problem, calls=calls)
            meanings[call.name] = (*meanings[call.name], replace(meaning, way=way))
            choice[call.name] = Placed(len(own.options), choice[call.name].place)
    if problem is built.problem:
        return built, solution
    need, every = needs(problem, choice), operations(problem, choice)
    late = {MOVE + name for name in need if not is_kept(problem, choice, name)}
    order = tuple(slot for slot in solution.order if slot.what in every and slot.what not in late)
    timeline = evaluate(problem, choice, order)
    return replace(built, problem=problem, meanings=meanings), replace(
        solution,
        choice=choice,
        order=order,
        timeline=timeline,
        makespan=timeline.makespan,
        bound=min(solution.bound, timeline.makespan),
    )


def _otherwise(
    models: Models, cluster: Cluster, built: Built, call: Call, meaning: Meaning, now: Option
) -> Option:
    """An option of a call that does something else with its weights when it has ended."""
    way: Way = meaning.way
    decoder = models.decoders[str(call.model)]
    longest = built.lengths.longest_prompt, built.lengths.longest_response
    host = node_device(pools(cluster)[meaning.pool].node).runtime == "cpu"
    needed = option_bytes(models.graph, call, way, decoder, longest, host=host)
    return replace(
        now,
        static_bytes=needed.weights,
        own_bytes=needed.own_bytes,
        active_bytes=needed.active_bytes,
        layout=way.text,
        keeps=way.after != "free",
        offload_seconds=built.costs[meaning.pool].offload(call.name, way).value / (call.every or 1),
    )


def call_plans(graph: Graph, cluster: Cluster, built: Built, solution: Solution) -> dict[str, CallPlan]:
    """How each call runs in a solution."""
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
