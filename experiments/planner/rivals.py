"""Other ways of planning, with the same costs: one layout for all, a heuristic, simulated annealing.

The first two choose layouts by a rule; what a rule leaves open (micro-batches, flags) they choose as well as
the search would. Annealing knows nothing but `evaluate`, and is code of its own.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from planner.formulas import Cut, stage_elements
from planner.options import Ask, Models, Pin, TooLarge, build
from planner.options.ways import layouts
from planner.search import Choice, Infeasible, Placed, Problem, Slot, Solution, Work, evaluate, misfits, solve
from planner.search.evaluate import holding, is_kept, needs
from planner.search.problem import MOVE, Order
from realflow.errors import InputError
from realflow.layout import Layout
from realflow.planfile import Cluster

RULED = Work(solver=4.0, rounds=2_000)
"""What choosing micro-batches and flags for given layouts may take."""


@dataclass(frozen=True)
class Rival:
    """What a rival came to: seconds of a step (None: it found nothing that fits), and how, in words."""

    makespan: float | None
    words: str
    tried: int


# ---- layouts by a rule -----------------------------------------------------------------------------------


def uniform(models: Models, cluster: Cluster, per_node: int, tighten: Sequence[int]) -> Rival:
    """The best of all plans in which every call runs with one layout on all devices."""
    size = len(cluster.devices)
    stages = min(len(decoder.layers) for decoder in models.decoders.values())
    best, words, tried = None, "no layout fits", 0
    for layout in layouts(size, per_node, most_data=size, most_stages=stages):
        names = [call.name for call in models.graph.calls if call.model]
        try:
            found = _ruled(models, cluster, dict.fromkeys(names, layout), tighten)
        except (TooLarge, Infeasible, InputError):
            continue
        tried += 1
        if best is None or found.makespan < best:
            best, words = found.makespan, str(layout)
    return Rival(best, words, tried)


def megatron(models: Models, cluster: Cluster, per_node: int, tighten: Sequence[int]) -> Rival:
    """Every call on all devices: first more tensor ranks inside a node, then more stages, until everything
    fits; data parallel for the rest."""
    size = len(cluster.devices)
    ladder = list(_ladder(size, per_node))
    calls = [call for call in models.graph.calls if call.model]
    level = {call.name: 0 for call in calls}
    tried = 0
    while True:
        tried += 1
        chosen = {name: ladder[at] for name, at in level.items()}
        try:
            found = _ruled(models, cluster, chosen, tighten)
        except TooLarge as error:
            raised = [error.call]
        except Infeasible:
            raised = _heaviest(models, level, ladder)
        except InputError as error:  # too few samples for so many replicas, or it cannot be cut so
            raised = [
                name for name in level if any(one.where.startswith(f"{name}=") for one in error.problems)
            ]
            assert raised, error
        else:
            words = ", ".join(f"{name} {layout}" for name, layout in chosen.items())
            return Rival(found.makespan, words, tried)
        for name in raised:
            if level[name] + 1 == len(ladder):
                return Rival(None, f"{name} fits with no layout of the rule", tried)
            level[name] += 1


def _ladder(size: int, per_node: int) -> Iterator[Layout]:
    """Layouts of all devices in the order in which they are tried."""
    tensor, stages = 1, 1
    while size % (tensor * stages) == 0:
        yield Layout(size // (tensor * stages), tensor, stages)
        if tensor < per_node:
            tensor *= 2
        else:
            stages *= 2


def _heaviest(models: Models, level: Mapping[str, int], ladder: Sequence[Layout]) -> list[str]:
    """The call that is cut next: what trains first, then the largest share of weights."""

    def weight(name: str) -> tuple[float, str]:
        call = models.graph.call(name)
        layout = ladder[level[name]]
        decoder = models.decoders[str(call.model)]
        share = stage_elements(decoder, Cut(), 0, len(decoder.layers)) / (layout.tp * layout.pp)
        return share * (8 if call.op == "train" else 1), name

    able = [name for name in level if level[name] + 1 < len(ladder)] or list(level)
    return [max(able, key=weight)]


def _ruled(
    models: Models, cluster: Cluster, chosen: Mapping[str, Layout], tighten: Sequence[int]
) -> Solution:
    """The best plan with these layouts on all devices."""
    whole = range(len(cluster.devices))
    pins = {name: Pin(layout, whole, text=f"{name}={layout}") for name, layout in chosen.items()}
    return solve(build(models, cluster, Ask(pins=pins), tighten=tighten).problem, seed=0, work=RULED)


# ---- annealing -------------------------------------------------------------------------------------------

HOT, COLD = 0.1, 1e-5
"""Temperatures at the begin and the end, as parts of the first makespan."""
PENALTY = 3.0
"""What lacking as much memory as there is costs, in makespans; there is a small one for lacking any."""


@dataclass
class _State:
    """A plan under annealing: how calls run, their priorities, and how many steps behind they work."""

    choice: dict[str, Placed]
    priority: dict[str, float]
    stage: dict[str, int]


class Annealer:
    """Simulated annealing over options, places, priorities and stages."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.rng = problem, random.Random(seed)
        self.calls = {call.name: call for call in problem.calls}
        self.names = [name for name, call in self.calls.items() if len(call.options[0].places[0])]
        self.total = max(problem.memory_bytes, default=0) or 1

    def run(self, seconds: float) -> Rival:
        """Anneal for so many seconds of a core, as if it were free; the best plan that fits."""
        state = self.first()
        cost, fits = self.cost(state)
        start, scale = time.thread_time(), cost
        best = cost if fits else math.inf
        final, rounds = state, 0
        while (gone := (time.thread_time() - start) / seconds) < 1.0:
            rounds += 1
            heat = scale * HOT * (COLD / HOT) ** gone
            draft = self.changed(state)
            new, fits = self.cost(draft)
            if new <= cost or self.rng.random() < math.exp((cost - new) / heat):
                state, cost = draft, new
                if fits and new < best:
                    best, final = new, draft
        if math.isinf(best):
            return Rival(None, "nothing that fits", rounds)
        makespan = self.checked(final)
        placed = ", ".join(f"{name} {self.text(final, name)}" for name in self.names)
        return Rival(makespan, placed, rounds)

    def first(self) -> _State:
        """The fastest option of each call, where it comes first."""
        choice = {}
        for name, call in self.calls.items():
            fastest = min(range(len(call.options)), key=lambda i: (call.options[i].duration, i))
            choice[name] = Placed(fastest, call.options[fastest].places[0])
        order = {name: float(index) for index, name in enumerate(self.calls)}
        moves = {MOVE + name: at - 0.5 for name, at in order.items()}
        return _State(choice, {**order, **moves}, dict.fromkeys(self.calls, 0))

    def changed(self, state: _State) -> _State:
        """A random neighbour."""
        draft = _State(dict(state.choice), dict(state.priority), dict(state.stage))
        name = self.rng.choice(self.names)
        what = self.rng.random()
        if what < 0.5:
            options = self.calls[name].options
            index = self.rng.randrange(len(options))
            places = options[index].places
            same = draft.choice[name].place
            keep = same in places and self.rng.random() < 0.7
            draft.choice[name] = Placed(index, same if keep else self.rng.choice(places))
        elif what < 0.75:
            places = self.calls[name].options[draft.choice[name].option].places
            draft.choice[name] = Placed(draft.choice[name].option, self.rng.choice(places))
        elif what < 0.95 or self.problem.overlap == 1:
            moved = self.rng.choice(list(draft.priority))
            draft.priority[moved] = self.rng.uniform(-1.0, len(self.calls))
        else:
            draft.stage[self.rng.choice(list(self.calls))] = self.rng.randrange(self.problem.overlap)
        return draft

    def cost(self, state: _State) -> tuple[float, bool]:
        """The makespan, with a penalty for memory that lacks; and whether it fits."""
        order = self.order(state)
        small, devices = _compressed(state.choice)
        makespan = evaluate(self.problem, small, order).makespan
        short = self.short(state.choice, devices)
        if short <= 0:
            return makespan, True
        return makespan * (1.0 + 0.05 + PENALTY * short / self.total), False

    def checked(self, state: _State) -> float:
        """The makespan, without any shortcut."""
        assert not misfits(self.problem, state.choice)
        return evaluate(self.problem, state.choice, self.order(state)).makespan

    def order(self, state: _State) -> Order:
        """Calls by priority, none before what it comes after; moves that are kept by theirs."""
        stage: dict[str, int] = {}
        for name, call in self.calls.items():  # the graph lists writers before readers
            stage[name] = max([state.stage[name], *(stage[one] for one in call.after)])
        need = needs(self.problem, state.choice)
        todo = list(self.calls)
        todo += [
            move for move in dict.fromkeys(need.values()) if is_kept(self.problem, state.choice, move[5:])
        ]
        todo.sort(key=state.priority.__getitem__)
        done: set[str] = set()
        slots = []
        while todo:
            what = next(
                what for what in todo if what not in self.calls or done.issuperset(self.calls[what].after)
            )
            todo.remove(what)
            if what in self.calls:
                done.add(what)
                moved = need.get(what)
                if moved in todo:  # it comes right before, unnamed
                    todo.remove(moved)
            slots.append(Slot(what, stage[what.removeprefix(MOVE)]))
        return tuple(slots)

    def short(self, choice: Choice, devices: Sequence[range]) -> int:
        """Bytes that the fullest run of devices lacks: `misfits`, for runs that the same calls use."""
        worst = -self.total
        for run in devices:
            here = [name for name, placed in choice.items()
                    if placed.place.start <= run.start and run.stop <= placed.place.stop]  # fmt: skip
            static: dict[tuple[str, str, int, int], int] = {}
            own, active = 0, 0
            for name in here:
                call, placed = self.calls[name], choice[name]
                option = call.options[placed.option]
                held = holding(call, placed)
                static[held] = max(static.get(held, 0), option.static_bytes)
                own += option.own_bytes
                active = max(active, option.active_bytes)
            room = min(self.problem.memory_bytes[run.start : run.stop])
            worst = max(worst, sum(static.values()) + own + active - room)
        return worst

    def text(self, state: _State, name: str) -> str:
        """An option and place in short."""
        placed = state.choice[name]
        layout = self.calls[name].options[placed.option].layout
        return f"{layout}@{placed.place.start}-{placed.place.stop - 1}"


def _compressed(choice: Choice) -> tuple[dict[str, Placed], list[range]]:
    """The same plan on one device for each run of devices that the same calls use, and these runs: it takes
    as long, and is evaluated in much less time."""
    marks = sorted({edge for placed in choice.values() for edge in (placed.place.start, placed.place.stop)})
    number = {mark: index for index, mark in enumerate(marks)}
    small = {
        name: replace(placed, place=range(number[placed.place.start], number[placed.place.stop]))
        for name, placed in choice.items()
    }
    return small, [range(a, b) for a, b in pairwise(marks)]
