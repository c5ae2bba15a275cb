"""The rules that every plan keeps, whether the planner or a person wrote it."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping

from realflow.errors import InputError, Problem
from realflow.graph.types import Call, Graph
from realflow.planfile.flags import OF_TRAINING
from realflow.planfile.holdings import Edge, follow_edges, holdings, planned_edges
from realflow.planfile.ranks import format_ranks
from realflow.planfile.types import CallPlan, Engine, Plan, ReallocPlan

ENGINES = ("native", "vllm", "python", "train", "infer")
AFTER = ("keep", "free", "offload")
SCHEDULES = ("1f1b", "zero_bubble")
ENGINES_OF: Mapping[str, tuple[Engine, ...]] = {
    "generate": ("native", "vllm"),
    "infer": ("infer",),
    "train": ("train",),
    "function": ("python",),
}
"""Op -> the engines that can run it; the first is the default."""


def check_plan(plan: Plan) -> None:
    """Raise InputError with everything in a plan that breaks a rule."""
    problems = find_problems(plan)
    if problems:
        raise InputError(problems)


def find_problems(plan: Plan, unread: frozenset[str] = frozenset(), *, moves: bool = True) -> list[Problem]:
    """Everything in a plan that breaks a rule; `where` is the dotted path in the plan file.

    `unread` names calls which the file has but which could not be read; `moves` says whether its
    reallocs are held against the calls.
    """
    problems = rule_problems(plan, unread)
    if moves and not problems and not unread:
        problems += _reallocs(plan)
    return problems + _expectations(plan)


def run_problems(plan: Plan) -> list[Problem]:
    """What a plan that keeps all rules has that no run can do yet."""
    if plan.graph.max_staleness == 0:
        return []
    message = f"{plan.graph.max_staleness} (asynchronous) cannot run yet; expected 0"
    return [Problem(message, where="graph.max_staleness")]


def check_runnable(plan: Plan) -> Plan:
    """The plan, if a run can do what it says; else InputError."""
    problems = run_problems(plan)
    if problems:
        raise InputError(problems)
    return plan


def rule_problems(plan: Plan, unread: frozenset[str] = frozenset()) -> list[Problem]:
    """What is wrong with the graph, the cluster and the calls of a plan, whatever follows from them."""
    problems = _nodes(plan)
    names = [call.name for call in plan.graph.calls]
    for name in plan.calls:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(
                Problem(
                    f"the graph has no call {name}{hint} (calls: {', '.join(names)})", where=f"calls.{name}"
                )
            )
    for name in names:
        if name in plan.calls:
            problems += _call(plan, name, plan.calls[name])
        elif name not in unread:
            problems.append(
                Problem(
                    f"is missing; every call of the graph needs ranks and a layout: add calls.{name}", "calls"
                )
            )
    if not problems and not unread:  # they compare the meshes of calls
        problems += _frees(plan)
    return problems


def needed_reallocs(graph: Graph, calls: Mapping[str, CallPlan]) -> list[tuple[ReallocPlan, Edge]]:
    """Every move of a step, without its bytes, and each edge behind it: the new weights of a model into
    the holdings of a call that lacks them, and into those of models that follow it."""
    trained = graph.trained()
    found = []
    for edge in (*planned_edges(graph, calls), *follow_edges(graph, calls)):
        follower = "" if edge.into == edge.model else edge.into
        found.append(
            (ReallocPlan(edge.model, trained[edge.model].name, edge.call, 0, 0, None, follower), edge)
        )
    return found


def idle_ranks(plan: Plan) -> tuple[int, ...]:
    """Ranks of the cluster that no call uses."""
    used = {rank for call in plan.calls.values() for rank in call.ranks}
    return tuple(rank for rank in range(plan.world_size) if rank not in used)


def _nodes(plan: Plan) -> list[Problem]:
    names = [node.name for node in plan.cluster.nodes]
    if not names:
        return [Problem("has no nodes; expected at least one", where="cluster.nodes")]
    problems = []
    for index, node in enumerate(plan.cluster.nodes):
        where = f"cluster.nodes.{index}"
        if node.name in names[:index]:
            problems.append(Problem(f"a node {node.name} is given twice", where=where))
        if not node.name or ":" in node.name:
            problems.append(
                Problem(f"{node.name!r} is no name for a node: empty or with a colon", where=where)
            )
        if node.devices < 1:
            problems.append(Problem(f"found {node.devices} devices; expected at least 1", where=where))
    if "local" in names and len(names) > 1:
        problems.append(
            Problem("local is the machine that the run starts on and stands alone", where="cluster.nodes")
        )
    return problems


def _call(plan: Plan, name: str, call: CallPlan) -> list[Problem]:
    op, scope = plan.graph.call(name).op, plan.graph.call(name).decl.scope
    found: list[Problem] = []

    def fail(key: str, message: str) -> None:
        found.append(Problem(message, where=f"calls.{name}.{key}"))

    layout = call.layout
    if len(call.ranks) != layout.size:
        fail("layout", f"{layout} needs {layout.size} ranks, but {len(call.ranks)} are given")
    for message in _rank_problems(call.ranks, plan.world_size):
        fail("ranks", message)
    if op == "function" and layout.dp < layout.size:
        fail("layout", f"{layout} cuts a model, but {name} is a function: use d{layout.size}")
    if call.engine not in ENGINES_OF[op]:
        fail("engine", f"{call.engine} cannot run op {op}; expected {' or '.join(ENGINES_OF[op])}")
    elif call.engine == "vllm":
        fail("engine", "vllm cannot run yet; use native")
    for key in ("micro_batch_tokens", "slots"):
        if getattr(call, key) < 1:
            fail(key, f"found {getattr(call, key)}; expected at least 1")
    if op == "function" and scope == "batch" and layout.dp > 1:
        fail("layout", f"{layout}: the function must see the whole batch at once (scope batch): use d1")
    for key, message in _flag_problems(plan.graph.call(name), call):
        fail(key, message)
    return found


def _rank_problems(ranks: tuple[int, ...], world: int) -> Iterator[str]:
    twice = sorted(rank for rank, count in Counter(ranks).items() if count > 1)
    if twice:
        yield f"{_names(twice)} given twice; a call uses a rank once"
    elif list(ranks) != sorted(ranks):
        yield f"found {format_ranks(ranks)}; expected rising ranks: {format_ranks(sorted(ranks))}"
    outside = sorted({rank for rank in ranks if not 0 <= rank < world})
    if outside:
        yield f"{_names(outside)} outside the cluster, whose {world} devices are ranks 0 to {world - 1}"


def _flag_problems(call: Call, where: CallPlan) -> Iterator[tuple[str, str]]:
    """`(key, message)` of flags that mean nothing to a call or its layout."""
    if call.op == "function" and where.after != "keep":
        yield "after", f"{where.after}, but {call.name} is a function and holds no weights: use keep"
    if call.op != "train":
        for key in OF_TRAINING:
            if getattr(where, key) != getattr(CallPlan, key):
                default = str(getattr(CallPlan, key)).lower()
                yield key, f"only train calls have it, and {call.name} is {call.op}: use {default}"
        return
    if where.schedule == "zero_bubble" and where.layout.pp == 1:
        yield "schedule", f"zero_bubble fills the gaps of a pipeline, and {where.layout} has none: use 1f1b"
    if where.sequence_parallel and where.layout.tp == 1:
        yield (
            "sequence_parallel",
            f"sequence_parallel divides tokens over a tensor group, and {where.layout} has none: leave it "
            "out",
        )


def _frees(plan: Plan) -> Iterator[Problem]:
    for name, call in plan.calls.items():
        if call.after == "free" and (reason := why_not_free(plan, name)):
            yield Problem(f"free: {reason}; use keep or offload", where=f"calls.{name}.after")


def why_not_free(plan: Plan, name: str) -> str | None:
    """Why nothing would bring the weights of a call again if they were let go of; None where a
    reallocation does. Where only some of its ranks share weights with training, those keep them."""
    graph = plan.graph
    model = str(graph.call(name).model)
    train = graph.trained().get(model)
    if train is None:
        return f"{model} is not trained, so that no reallocation brings its weights again"
    if train.name == name:
        return f"{name} has the newest weights of {model}, which other calls get from it"
    own, trained = holdings(plan.calls[name]), holdings(plan.calls[train.name])
    if all(trained.get(rank) == held for rank, held in own.items()):
        return f"{name} uses the very weights that {train.name} trains, so that no reallocation brings them"
    return None


def _reallocs(plan: Plan) -> list[Problem]:
    """The file lists exactly the moves that the calls need, so that no call runs stale weights."""
    problems = []
    needed = {_move(realloc): realloc for realloc, _ in needed_reallocs(plan.graph, plan.calls)}
    found: set[Move] = set()
    for index, realloc in enumerate(plan.reallocs):
        where, move = f"reallocs.{index}", _move(realloc)
        if move in found:
            problems.append(Problem(f"{_words(realloc)} is given twice: remove one", where=where))
        elif move not in needed:
            message = (
                f"{_words(realloc)} is not needed: {_why_no_move(plan, realloc)}; remove it from reallocs"
            )
            problems.append(Problem(message, where=where))
        if realloc.bytes < realloc.lower_bound_bytes:
            message = (
                f"bytes {realloc.bytes} is below lower_bound_bytes {realloc.lower_bound_bytes}; realflow "
                "explain counts both anew, so that 0 will do"
            )
            problems.append(Problem(message, where=where))
        found.add(move)
    for move in sorted(needed.keys() - found):
        message = (
            f"{_words(needed[move])} is missing: {_why_move(plan, needed[move])}; add this line, or make the "
            f"plan again with realflow plan: - {_entry(needed[move])}"
        )
        problems.append(Problem(message, where="reallocs"))
    return problems


Move = tuple[str, str, str, str]


def _move(realloc: ReallocPlan) -> Move:
    """A move without its bytes."""
    return realloc.model, realloc.source, realloc.destination, realloc.follower


def _words(realloc: ReallocPlan) -> str:
    into = realloc.destination or f"{realloc.follower}, which follows it,"
    return f"{realloc.model} from {realloc.source} to {into}"


def _entry(realloc: ReallocPlan) -> str:
    """A move as a line of the file; its bytes are counted when it is shown or run."""
    into = f"follower: {realloc.follower}" if realloc.follower else f"destination: {realloc.destination}"
    return f"{{model: {realloc.model}, source: {realloc.source}, {into}, bytes: 0, lower_bound_bytes: 0}}"


def _why_move(plan: Plan, realloc: ReallocPlan) -> str:
    if realloc.follower:
        return f"the graph says that {realloc.follower} follows {realloc.model}"
    one, other = (plan.calls[name] for name in (realloc.source, realloc.destination))
    return (
        f"{realloc.destination} ({_place(other)}) lacks weights that {realloc.source} ({_place(one)}) trains"
    )


def _place(where: CallPlan) -> str:
    """A call's layout and ranks in words."""
    return f"{where.layout} on {format_ranks(where.ranks)}"


def _why_no_move(plan: Plan, realloc: ReallocPlan) -> str:
    """Why the layouts of the calls ask for no such move."""
    graph = plan.graph
    names = [call.name for call in graph.calls]
    train = graph.trained().get(realloc.model)
    if train is None:
        return f"no call trains {realloc.model}"
    if realloc.source != train.name:
        return f"new weights of {realloc.model} come from {train.name}, not from {realloc.source}"
    if realloc.follower:
        return f"{realloc.follower} does not follow {realloc.model} in the graph"
    if realloc.destination not in names:
        return f"the graph has no call {realloc.destination} (calls: {', '.join(names)})"
    model = graph.call(realloc.destination).model
    if model != realloc.model:
        return f"{realloc.destination} uses {'the model ' + model if model else 'no model'}"
    return f"{realloc.destination} finds its weights where it runs"


def _expectations(plan: Plan) -> list[Problem]:
    problems = []
    known = ", ".join(plan.graph.models) or "none"
    for model in plan.cards:
        if model not in plan.graph.models:
            problems.append(
                Problem(f"the graph has no model {model} (models: {known})", where=f"cards.{model}")
            )
    outside = sorted(rank for rank in {*plan.memory, *plan.moments} if not 0 <= rank < plan.world_size)
    if outside:
        problems.append(Problem(f"{_names(outside)} outside the cluster", where="memory"))
    for index, entry in enumerate(plan.timeline):
        if entry.end < entry.start:
            problems.append(
                Problem(
                    f"ends at {entry.end}, before its start {entry.start}",
                    where=f"predicted.timeline.{index}",
                )
            )
    bounds = (plan.lower_bound_seconds, plan.step_seconds)
    if bounds[0] is not None and bounds[1] is not None and bounds[0] > bounds[1]:
        problems.append(
            Problem(f"the lower bound {bounds[0]} s is above step_seconds {bounds[1]}", where="predicted")
        )
    for key, value in (("factor", plan.deadline_factor), ("floor_seconds", plan.deadline_floor_seconds)):
        if value <= 0:
            problems.append(Problem(f"found {value}; expected more than 0", where=f"deadline.{key}"))
    return problems


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {format_ranks(ranks)} are"
