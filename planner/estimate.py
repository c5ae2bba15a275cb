"""What a plan costs, wherever it comes from: searched, given by layouts, or edited by hand.

found = estimate(plan, decoders, profile=profile)      -> Estimate: timeline, seconds of calls and moves
anew = with_estimate(plan, found)                      -> the plan with these seconds

The plan is taken as a problem of the search with one option for each call, so that its seconds mean what
those of a search mean. `planner.critical` says what the step's length hangs on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, permutations

from planner.costs import CallCost, Costs
from planner.decoder import Decoder
from planner.hardware import catalogue
from planner.lengths import Lengths, read_lengths
from planner.loads import How
from planner.meshes import Pool, pools
from planner.options.moves import Moves
from planner.options.rules import comes_after, costs_on
from planner.profile import Profile
from planner.rates import is_of
from planner.search import MOVE, Call, Choice, Option, Placed, Problem, Slot, Timeline, Work, evaluate, solve
from planner.search.evaluate import is_kept, needs
from planner.search.problem import Entry, Order
from planner.searchnotes import cost_notes
from realflow.graph.types import Call as GraphCall
from realflow.planfile import Plan, TimelineEntry
from realflow.planfile.types import LENGTHS

GIVEN = "Layouts are as given, not searched; seconds are not estimated. Memory is estimated from cards."
"""A note of plans whose seconds nobody has estimated; `with_estimate` takes it away."""

SAME = 1e-6
"""Seconds that differ by less (as a part of them) are equal."""
_MOST_KINDS = 7
"""Kinds of ranks (used by the same calls) whose orders are tried, to make runs of what calls use."""
_ORDERS = Work(solver=2.0, rounds=2_000)
"""What finding an order of a plan whose steps overlap may take."""


@dataclass(frozen=True)
class Estimate:
    """What a plan is expected to take. `problem` has one option for each call, and device number `i` of it
    is rank `ranks[i]`; `bookkeeping` are seconds of a step in which no call runs."""

    plan: Plan
    problem: Problem
    choice: Choice
    order: Order
    timeline: Timeline
    costs: Mapping[str, CallCost]
    bookkeeping: float
    lengths: Lengths
    ranks: tuple[int, ...]
    on: Mapping[str, tuple[Costs, ...]]
    """Call -> what calls cost on the kinds of devices that it runs on."""
    profile: Profile | None = None
    notes: tuple[str, ...] = ()

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return self.timeline.makespan + self.bookkeeping

    @property
    def hashes(self) -> dict[str, str]:
        """What the seconds come from."""
        found = {"catalogue": catalogue().hash}
        return found if self.profile is None else {**found, "profile": self.profile.hash}

    def seconds_of(self, call: str, how: How) -> float:
        """What a call would take if it ran otherwise on its devices."""
        return max(costs.call(call, how).seconds for costs in self.on[call])

    def ranks_of(self, entry: Entry) -> tuple[int, ...]:
        """The ranks that an operation takes; of a function those that it runs on."""
        if not entry.devices and entry.what in self.plan.calls:
            return self.plan.calls[entry.what].ranks
        return tuple(sorted(self.ranks[device] for run in entry.devices for device in run))


def estimate(
    plan: Plan,
    decoders: Mapping[str, Decoder],
    *,
    profile: Profile | None = None,
    function_seconds: Mapping[str, float] | None = None,
) -> Estimate:
    """Seconds of a plan's calls, moves and steps. `decoders` has every model, with its head; `profile` counts
    where it was measured on devices of the plan. Raises InputError where lengths cannot be read."""
    graph = plan.graph
    lengths = read_lengths(graph)
    all_pools = pools(plan.cluster)
    costs = [costs_on(pool, graph, decoders, lengths, profile, function_seconds or {}) for pool in all_pools]
    ranks, in_runs = _numbering(plan)
    position = {rank: index for index, rank in enumerate(ranks)}
    found: dict[str, CallCost] = {}
    on = {call.name: _costs_of(plan, call, all_pools, costs) for call in graph.calls}
    calls = []
    for call in graph.calls:
        own = on[call.name]
        how = plan.calls[call.name]
        found[call.name] = max((one.call(call.name, how) for one in own), key=lambda cost: cost.seconds)
        every = call.every or 1
        places = [position[rank] for rank in how.ranks] if call.model else []
        option = Option(
            (range(min(places), max(places) + 1) if places else range(0),),
            found[call.name].seconds / every,
            layout=str(how.layout),
            keeps=how.after != "free",
            offload_seconds=max(one.offload(call.name, how).value for one in own) / every,
        )
        train = call.op == "train"
        calls.append(Call(call.name, (option,), comes_after(graph, call), call.model, train))
    layouts = {call.name: [call.options[0].layout] for call in calls}
    problem = Problem(
        memory_bytes=(0,) * plan.world_size,  # whether it fits is for `planner.memory` to say
        calls=tuple(calls),
        moves=dict(Moves(graph, costs, plan.world_size, layouts)),
        follows={name: spec.follows.model for name, spec in graph.models.items() if spec.follows},
        overlap=graph.max_staleness + 1,
    )
    choice = {call.name: Placed(0, call.options[0].places[0]) for call in calls}
    order = order_of(plan, problem, choice)
    return Estimate(
        plan,
        problem,
        choice,
        order,
        evaluate(problem, choice, order),
        found,
        max(one.rates.constant("step").value for one in costs),
        lengths,
        ranks,
        on,
        profile if profile and any(is_of(profile, node) for node in plan.cluster.nodes) else None,
        () if in_runs else (_SPREAD,),
    )


_SPREAD = (
    "Seconds: ranks of a call do not stand beside each other in any numbering; it is taken to keep those "
    "between busy, too."
)


def with_estimate(plan: Plan, found: Estimate) -> Plan:
    """The plan with the seconds of an estimate, and a note of how they differ from those that it has. It is
    left as it is where they do not. What was proven of a plan with other seconds, is dropped."""
    anew = replace(
        plan,
        calls={
            name: replace(how, predicted_seconds=found.costs[name].seconds)
            for name, how in plan.calls.items()
        },
        reallocs=tuple(
            replace(one, predicted_seconds=_moved(found, one.destination, one.follower))
            for one in plan.reallocs
        ),
        timeline=tuple(
            TimelineEntry(entry.what, found.ranks_of(entry), entry.start, entry.end)
            for entry in found.timeline.entries
        ),
        step_seconds=found.step_seconds,
        lower_bound_seconds=None,
        gap=None,
        hashes={**{key: value for key, value in plan.hashes.items() if key != "profile"}, **found.hashes},
        extra={**plan.extra, LENGTHS: found.lengths.means},
    )
    differs = differences(plan, anew)
    if not differs and plan.step_seconds is not None:
        return plan
    notes = [note for note in plan.notes if not note.startswith(("Search:", "Seconds:", "Lengths:", GIVEN))]
    if GIVEN in plan.notes:
        notes.insert(0, "Layouts are as given, not searched. Memory is estimated from cards.")
    notes += [*differs, f"Lengths: {found.lengths.note}."]
    notes += [note for note in (*cost_notes(found.costs), *found.notes) if note not in notes]
    return replace(anew, notes=tuple(notes))


def differences(plan: Plan, anew: Plan) -> list[str]:
    """How the seconds of an estimate differ from those that a plan has; empty where they do not, or it
    has none."""
    if plan.step_seconds is None or anew.step_seconds is None:
        return []
    pairs = {
        name: (how.predicted_seconds, anew.calls[name].predicted_seconds) for name, how in plan.calls.items()
    }
    pairs |= {
        f"moving weights to {one.destination or one.follower}": (one.predicted_seconds, new.predicted_seconds)
        for one, new in zip(plan.reallocs, anew.reallocs, strict=True)
    }
    changed = [
        f"{name} {_said(new)} in place of {_said(old)}"
        for name, (old, new) in pairs.items()
        if _apart(old, new)
    ]
    if not changed and not _apart(plan.step_seconds, anew.step_seconds):
        return []
    also = f" ({', '.join(changed)})" if changed else ""
    others = [
        f"another {key}" for key in ("profile", "catalogue") if plan.hashes.get(key) != anew.hashes.get(key)
    ]
    source = f", with {' and '.join(others)}" if others else ""
    return [
        f"Seconds are estimated anew{source}: {anew.step_seconds:.4g} s a step, and "
        f"{plan.step_seconds:.4g} s in the file{also}. What was proven of the plan in the file does not hold "
        "for this one."
    ]


def _said(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds:.4g} s"


def _apart(old: float | None, new: float | None) -> bool:
    """Whether seconds differ by more than rounding."""
    if old is None or new is None:
        return old is not new
    return abs(old - new) > SAME * max(old, new)


def _moved(found: Estimate, destination: str, follower: str) -> float | None:
    """Seconds of the move for a call, or of all moves into a follower."""
    need = needs(found.problem, found.choice)
    seconds = {entry.what: entry.end - entry.start for entry in found.timeline.entries}
    if destination:
        move = need.get(destination, MOVE + destination)
        return seconds.get(move)
    own = [MOVE + call.name for call in found.problem.calls if call.model == follower]
    return sum(seconds[what] for what in own if what in seconds)


def _costs_of(
    plan: Plan, call: GraphCall, all_pools: tuple[Pool, ...], costs: list[Costs]
) -> tuple[Costs, ...]:
    """Those of the kinds of devices that a call runs on; of a function all."""
    if call.model is None:
        return tuple(costs)
    ranks = plan.calls[call.name].ranks
    return tuple(
        one for pool, one in zip(all_pools, costs, strict=True) if any(rank in pool.devices for rank in ranks)
    )


# ---- order ---------------------------------------------------------------------------------------------


def order_of(plan: Plan, problem: Problem, choice: Choice) -> Order:
    """The order of operations: that of the plan's timeline where it still is one of this plan, else the
    graph's, in which a run starts calls. Where steps overlap and there is no timeline, a good one."""
    told = _told_order(plan, problem, choice)
    if told is not None:
        return told
    if problem.overlap > 1:
        return solve(problem, seed=0, work=_ORDERS).order
    return tuple(Slot(call.name) for call in _in_order(problem))


def _in_order(problem: Problem) -> Iterator[Call]:
    """Calls in the graph's order, but none before what it comes after."""
    done: set[str] = set()
    left = list(problem.calls)
    while left:
        call = next(call for call in left if set(call.after) <= done)
        left.remove(call)
        done.add(call.name)
        yield call


def _told_order(plan: Plan, problem: Problem, choice: Choice) -> Order | None:
    """The order of a plan's timeline; None where it is not one of this plan."""
    by_name = {call.name: call for call in problem.calls}
    entries = {entry.what: entry for entry in plan.timeline}
    if not set(by_name) <= set(entries):
        return None
    stages: dict[str, int] = {}
    for call in _in_order(problem):  # what ends after a call has begun, belongs to a newer step
        stages[call.name] = max(
            (
                stages[name] + (entries[name].end > entries[call.name].start * (1 + SAME) + SAME)
                for name in call.after
            ),
            default=0,
        )
    index = {what: place for place, what in enumerate(entries)}
    for call in problem.calls:
        early = [name for name in call.after if stages[name] == stages[call.name]]
        if stages[call.name] >= problem.overlap or any(index[name] > index[call.name] for name in early):
            return None
    need = needs(problem, choice)
    named = {move for call, move in need.items() if is_kept(problem, choice, call)}
    return tuple(
        Slot(what, stages[what.removeprefix(MOVE)])
        for what in entries
        if what in by_name or (what in named and what.removeprefix(MOVE) in stages)
    )


# ---- numbers of devices --------------------------------------------------------------------------------


def _numbering(plan: Plan) -> tuple[tuple[int, ...], bool]:
    """Ranks in an order in which those of every call are a run, and whether there is one: a person may have
    given a call ranks such as 0 and 2. Ranks that the same calls use stay together."""
    own = tuple(range(plan.world_size))
    used = {name: set(how.ranks) for name, how in plan.calls.items() if plan.graph.call(name).model}
    if _are_runs(own, used):
        return own, True
    kinds: dict[frozenset[str], list[int]] = {}
    for rank in own:
        users = frozenset(name for name, ranks in used.items() if rank in ranks)
        kinds.setdefault(users, []).append(rank)
    if len(kinds) <= _MOST_KINDS:
        for order in permutations(kinds.values()):
            found = tuple(chain.from_iterable(order))
            if _are_runs(found, used):
                return found, True
    return own, False


def _are_runs(order: tuple[int, ...], used: Mapping[str, set[int]]) -> bool:
    """Whether ranks that belong together stand beside each other."""
    position = {rank: index for index, rank in enumerate(order)}
    spans = ([position[rank] for rank in ranks] for ranks in used.values() if ranks)
    return all(max(span) - min(span) == len(span) - 1 for span in spans)
