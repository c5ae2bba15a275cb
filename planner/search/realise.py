"""From a sketch to a plan: places for the calls of a solution of the class model.

A device takes part in several calls at once where their runs meet, and runs meet all together if each two
of them do: so which sets may not meet, for time or for memory, is all that positions must keep to.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from ortools.sat.python import cp_model

from planner.search.evaluate import chosen, evaluate, holding, misfits, needs
from planner.search.groups import Grouped
from planner.search.problem import MOVE, Call, Choice, Order, Placed, Problem, Slot
from planner.search.sketches import Sketch, Span
from planner.search.solver import make_solver

Plan = tuple[Choice, Order]


def realise(problem: Problem, view: Grouped, sketch: Sketch, *, seed: int, seconds: float) -> Plan | None:
    """A plan with the groups of a sketch that fits, as close to its timing as places allow, within
    `seconds` of deterministic work. None if no places were found."""
    choice = _Places(problem, view, sketch).solve(seed, seconds)
    if choice is None or misfits(problem, choice):
        return None
    orders = [_order(problem, choice, sketch.spans, early=early) for early in (False, True)]
    return choice, min(orders, key=lambda order: evaluate(problem, choice, order).makespan)


class _Places:
    """Where the run of each call starts."""

    def __init__(self, problem: Problem, view: Grouped, sketch: Sketch) -> None:
        self.problem, self.view, self.sketch = problem, view, sketch
        self.model = cp_model.CpModel()
        self.at: dict[str, dict[int, Placed]] = {}
        for name, group in sketch.groups.items():
            pairs = [Placed(index, place) for index, places in group.members for place in places]
            self.at[name] = {pair.place.start: pair for pair in reversed(pairs)}
        self.size = {name: group.size for name, group in sketch.groups.items()}
        self.start = {
            name: self.model.new_int_var_from_domain(cp_model.Domain.from_values(sorted(at)), name)
            for name, at in self.at.items()
        }
        self.calls = [name for name in self.at if self.size[name]]
        self.apart = {pair: self._apart(*pair) for pair in combinations(self.calls, 2)}
        for one, other in sorted(sketch.same):
            self.model.add(self.start[one] == self.start[other])
        for calls in self._too_full():
            self.model.add_bool_or([self.apart[pair] for pair in combinations(calls, 2)])
        self.model.minimize(self._lost())

    def solve(self, seed: int, seconds: float) -> Choice | None:
        """Option and place of each call."""
        solver = make_solver(seed, seconds)
        if solver.solve(self.model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        return {name: at[solver.value(self.start[name])] for name, at in self.at.items()}

    def _apart(self, one: str, other: str) -> Any:
        """Literal: no device is used by both."""
        left, right, apart = (self.model.new_bool_var("") for _ in range(3))
        self.model.add(self.start[one] + self.size[one] <= self.start[other]).only_enforce_if(left)
        self.model.add(self.start[other] + self.size[other] <= self.start[one]).only_enforce_if(right)
        self.model.add_bool_or(left, right, ~apart)
        return apart

    def _too_full(self) -> list[tuple[str, ...]]:
        """The smallest sets of calls that cannot all be on one device."""
        found: list[tuple[str, ...]] = []
        for count in range(2, len(self.calls) + 1):
            for calls in combinations(self.calls, count):
                if not any(set(smaller) <= set(calls) for smaller in found) and not self._fit(calls):
                    found.append(calls)
        return found

    def _fit(self, calls: tuple[str, ...]) -> bool:
        groups = self.sketch.groups
        static = sum(
            max(groups[other].static for other in calls if other == name or (name, other) in self.sketch.same)
            for index, name in enumerate(calls)
            if not any((name, other) in self.sketch.same for other in calls[:index])
        )
        static += sum(groups[name].own for name in calls)
        shared = [memory for pool, memory in enumerate(self.view.memory)
                  if all(groups[name].counts[pool] for name in calls)]  # fmt: skip
        return static + max(groups[name].active for name in calls) <= min(shared, default=1 << 63)

    def _lost(self) -> Any:
        """Ticks for which operations that the sketch runs at once meet, and ticks that moves may take longer
        because a run is not inside another."""
        lost = []
        spans = {what: span for what, span in self.sketch.spans.items() if span.end > span.start}
        weights: dict[tuple[str, str], int] = {}
        for (what, one), (its, other) in combinations(spans.items(), 2):
            ticks = min(one.end, other.end) - max(one.start, other.start)
            for mine in self._on(what):
                for yours in self._on(its):
                    if ticks > 0 and mine != yours and self.size[mine] and self.size[yours]:
                        pair = (mine, yours) if (mine, yours) in self.apart else (yours, mine)
                        weights[pair] = max(weights.get(pair, 0), ticks)
        lost += [weight * ~self.apart[pair] for pair, weight in weights.items()]
        for outer, inner in sorted(self.sketch.inside - self.sketch.same):
            leaves = self.model.new_bool_var("")
            self.model.add(self.start[outer] <= self.start[inner]).only_enforce_if(~leaves)
            ends = [self.start[name] + self.size[name] for name in (inner, outer)]
            self.model.add(ends[0] <= ends[1]).only_enforce_if(~leaves)
            lost.append(leaves)
        return sum(lost)

    def _on(self, what: str) -> tuple[str, ...]:
        """The calls whose devices an operation takes."""
        if not what.startswith(MOVE):
            return (what,)
        name = what.removeprefix(MOVE)
        model = self.problem.call(name).model or ""
        train = self.problem.trained()[self.problem.follows.get(model, model)]
        return (train.name, name)


def _order(problem: Problem, choice: Choice, spans: Mapping[str, Span], *, early: bool) -> Order:
    """The order of a sketch's starts: where weights are let go after each call, by the start of the call, or
    (`early`) by that of the move."""
    held = {call.name: holding(call, choice[call.name]) for call in problem.calls}
    keeping = {held[call.name] for call in problem.calls if chosen(problem, choice, call.name).keeps}
    ranks: dict[str, tuple[int, int]] = {}
    moves: dict[str, tuple[int, int]] = {}
    need = needs(problem, choice)
    for place, call in enumerate(_in_order(problem)):
        span, move = spans[call.name], spans.get(need.get(call.name, ""))
        start = span.start
        if move and held[call.name] in keeping:
            moves[need[call.name]] = (move.start, -1)
        elif move and early:
            start = max([min(start, move.start), *(ranks[before][0] for before in call.after)])
        ranks[call.name] = (start, place)
    order = sorted(ranks | moves, key=lambda what: (ranks | moves)[what])
    return tuple(Slot(what, spans[what].stage) for what in order)


def _in_order(problem: Problem) -> list[Call]:
    """Calls, each after those that it comes after."""
    found: dict[str, Call] = {}
    while len(found) < len(problem.calls):
        ready = [call for call in problem.calls if call.name not in found and set(call.after) <= found.keys()]
        assert ready, "calls wait for each other in a circle"
        found |= {call.name: call for call in ready}
    return list(found.values())
