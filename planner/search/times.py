"""When each operation runs: the time half of the exact model, over literals that say who shares devices.

Seconds are counted in whole ticks, rounded down, so that no plan is shorter than its time here says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from ortools.sat.python import cp_model

from planner.search.positions import Positions
from planner.search.problem import MOVE, Call, Problem, Slot

_BITS = 26
"""The ticks of the longest step: below 2 to this power. OR-Tools 9.15 sums what multiplies literals in 32
bits (its issue 5293) and then proves what is not true; tests/search/test_search_exact.py has a case."""


@dataclass
class _Operation:
    """`calls`: those whose devices it takes. `active`: the literal that it happens at all (None: always).
    `late`: the literal that it stands right before the call, whose number is `of`."""

    name: str
    calls: tuple[str, ...]
    start: Any
    end: Any
    active: Any = None
    late: Any = None
    of: str | None = None
    stage: Any = 0
    place: Any = None


class Times:
    """Starts and ends of calls and moves; `makespan` is to be minimised."""

    def __init__(self, problem: Problem, space: Positions, most: float | None = None) -> None:
        """`most`: seconds of a plan that is known."""
        self.problem, self.space, self.model = problem, space, space.model
        longest = _longest(problem) if most is None else min(most, _longest(problem))
        self.second = math.ldexp(1.0, _BITS - math.frexp(longest)[1])
        self.horizon = int(longest * self.second) + 3 * len(problem.calls)
        self.makespan = self.model.new_int_var(0, self.horizon, "makespan")
        self.seconds = {
            call.name: [self.ticks(option.duration) for option in call.options] for call in problem.calls
        }
        self.frees = any(
            not option.keeps
            for call in problem.calls
            if call.model in problem.trained() and not call.trains
            for option in call.options
        )
        self.operations: dict[str, _Operation] = {}
        for call in problem.calls:
            self._add_call(call)
        for call in problem.calls:
            for before in call.after:
                self._after(call.name, before)
        for model, train in problem.trained().items():
            users = [call for call in problem.calls if call.model == model and not call.trains]
            self._add_moves(train, users)
        for model, leader in problem.follows.items():
            followers = [call for call in problem.calls if call.model == model]
            self._add_following(problem.trained()[leader], followers)
        for one, other in combinations(self.operations.values(), 2):
            self._apart(one, other)
        for load in space.load(self.seconds):
            self.model.add(load <= self.makespan)

    def ticks(self, seconds: float) -> int:
        """Whole ticks, rounded down (exact: a second has a power of two of them); what is beyond the
        horizon is as good as just beyond it."""
        return min(int(seconds * self.second), self.horizon + 1)

    def bound(self, ticks: float) -> float:
        """Seconds that no plan is below, for ticks that no plan is below: what adding rounded numbers may
        lose is taken off."""
        return max(0.0, math.floor(ticks) / self.second * (1 - 4 * len(self.operations) * 2.0**-53))

    def order(self, solver: cp_model.CpSolver) -> tuple[Slot, ...]:
        """The order that a solver found."""

        def first(operation: _Operation) -> tuple[int, ...]:
            times = solver.value(operation.start), solver.value(operation.end), depth[operation.name]
            return (solver.value(operation.place), *times) if self.frees else times

        depth = self._depths()
        named = [
            operation
            for operation in self.operations.values()
            if (operation.active is None or solver.value(operation.active))
            and not (operation.late is not None and solver.value(operation.late))
        ]
        return tuple(Slot(one.name, int(solver.value(one.stage))) for one in sorted(named, key=first))

    def _depths(self) -> dict[str, int]:
        """Operation -> the most operations that it comes after, one by one."""
        depth: dict[str, int] = {}
        while len(depth) < len(self.problem.calls):
            for call in self.problem.calls:
                if call.name not in depth and all(before in depth for before in call.after):
                    depth[call.name] = 1 + max((depth[before] for before in call.after), default=0)
        last = 1 + max(depth.values(), default=0)
        followers = {call.name for call in self.problem.calls if call.model in self.problem.follows}
        moves = [name for name in self.operations if name.startswith(MOVE)]
        return depth | {name: last * (name.removeprefix(MOVE) in followers) for name in moves}

    def _add(self, name: str, calls: tuple[str, ...], duration: Any, **more: Any) -> _Operation:
        start = self.model.new_int_var(0, self.horizon, f"start.{name}")
        end = self.model.new_int_var(0, self.horizon, f"end.{name}")
        self.model.add(end == start + duration)
        self.model.add(end <= self.makespan)
        operation = self.operations[name] = _Operation(name, calls, start, end, **more)
        if self.frees:
            most = 3 * len(self.problem.calls)
            operation.place = self.model.new_int_var(0, most, f"place.{name}")
        return operation

    def _add_call(self, call: Call) -> None:
        operation = self._add(call.name, (call.name,), self.space.sum(call.name, self.seconds[call.name]))
        if self.problem.overlap > 1:
            operation.stage = self.model.new_int_var(0, self.problem.overlap - 1, f"stage.{call.name}")

    def _after(self, what: str, before: str) -> None:
        """An operation waits for a call of its own stage, and works on no newer step."""
        one, other = self.operations[before], self.operations[what]
        same = []
        if self.problem.overlap > 1:
            older = self.model.new_bool_var(f"{before}<{what}")
            self.model.add(one.stage < other.stage).only_enforce_if(older)
            self.model.add(one.stage <= other.stage)
            same = [~older]
        active = [] if other.active is None else [other.active]
        self.model.add(one.end <= other.start).only_enforce_if([*same, *active])
        if self.frees:
            self.model.add(one.place < other.place).only_enforce_if([*same, *active])

    def _add_moves(self, train: Call, users: list[Call]) -> None:
        """Into each layout and place but the train call's: once where some call keeps what it holds, else
        before each call."""
        names = [call.name for call in users]
        shared = {
            (one, other): self.space.shared(one, other) for one in names for other in names if one != other
        }
        kept: dict[str, Any] = {}
        for call in users:
            name = call.name
            needed = ~self.space.shared(name, train.name)
            kept[name] = self._kept(name, [other for other in names if other != name])
            earlier = [shared[name, other] for other in names[: names.index(name)]]
            active = self.model.new_bool_var(f"moves.{name}")
            # Without its own move it is in place, or shares what an earlier call is brought.
            self.model.add_bool_or(active, ~needed, *earlier)
            self.model.add_bool_or(active, ~needed, kept[name])
            late = self.model.new_bool_var(f"late.{name}")
            self.model.add_bool_or(~active, kept[name], late)
            self.model.add_implication(late, active)
            self.model.add_implication(late, ~kept[name])
            self.model.add_implication(active, needed)
            for other in earlier:
                self.model.add_bool_or(~active, ~kept[name], ~other)
            move = self._add(
                MOVE + name, (name, train.name), self._move(call, train), active=active, late=late, of=name
            )
            self._bring(move, name, [active])
            if self.frees:
                self.model.add(move.place == self.operations[name].place).only_enforce_if(late)
        for one, other in combinations(names, 2):
            move = self.operations[MOVE + one]
            self._bring(move, other, [move.active, shared[one, other], kept[one]])

    def _kept(self, name: str, others: list[str]) -> Any:
        """Literal: some call that shares what a call holds keeps it."""
        literal = self.model.new_bool_var(f"kept.{name}")
        keeping = []
        for other in others:
            both = self.model.new_bool_var(f"kept.{name}.{other}")
            self.model.add_implication(both, self.space.shared(name, other))
            self.model.add(both <= self.space.keeps(other))
            self.model.add(both >= self.space.keeps(other) + self.space.shared(name, other) - 1)
            self.model.add_implication(both, literal)
            keeping.append(both)
        self.model.add(self.space.keeps(name) <= literal)
        self.model.add(sum(keeping) + self.space.keeps(name) >= literal)
        return literal

    def _bring(self, move: _Operation, name: str, conditions: list[Any]) -> None:
        """A call starts when its weights are there."""
        call = self.operations[name]
        self.model.add(move.end <= call.start).only_enforce_if(conditions)
        if self.frees and move.of != name:
            self.model.add(move.place < call.place).only_enforce_if(conditions)
        elif self.frees:
            self.model.add(move.place < call.place).only_enforce_if([*conditions, ~move.late])

    def _add_following(self, train: Call, followers: list[Call]) -> None:
        """At the end, into each layout and place of the follower."""
        names = [call.name for call in followers]
        for index, call in enumerate(followers):
            active = self.model.new_bool_var(f"follows.{call.name}")
            earlier = [self.space.shared(call.name, one) for one in names[:index]]
            self.model.add_bool_or(active, *earlier)
            for literal in earlier:
                self.model.add_implication(active, ~literal)
            move = self._add(
                MOVE + call.name, (call.name, train.name), self._move(call, train), active=active
            )
            if self.problem.overlap > 1:
                move.stage = self.model.new_int_var(0, self.problem.overlap - 1, f"stage.{MOVE}{call.name}")
            for before in [train.name, *names]:
                self._after(move.name, before)

    def _move(self, call: Call, train: Call) -> Any:
        """Ticks of a move, by both layouts and by whether the destination is inside the source."""
        costs = {
            (source, into): self.problem.moves[str(call.model), source, into]
            for source, into in product(self.space.layouts(train.name), self.space.layouts(call.name))
            if (str(call.model), source, into) in self.problem.moves
        }
        top = max((self.ticks(max(cost.inside, cost.apart)) for cost in costs.values()), default=0)
        ticks = self.model.new_int_var(0, top, f"ticks.{call.name}")
        out = self.space.sticks_out(call.name, train.name)
        for (source, into), cost in costs.items():
            both = [self.space.layouts(train.name)[source], self.space.layouts(call.name)[into]]
            low, high = sorted((self.ticks(cost.inside), self.ticks(cost.apart)))
            self.model.add(ticks >= low).only_enforce_if(both)
            if high > low:
                wide = out if cost.apart > cost.inside else ~out
                self.model.add(ticks >= high).only_enforce_if([*both, wide])
        return ticks

    def _apart(self, one: _Operation, other: _Operation) -> None:
        """Two operations that share a device do not overlap in time."""
        calls = {tuple(sorted(pair)) for pair in product(one.calls, other.calls)}
        sharing = (
            [None]
            if any(a == b for a, b in calls)
            else [self.space.together(*pair) for pair in sorted(calls)]
        )
        if one.of == other.name or other.of == one.name:
            return  # a move and its call: one after the other anyway
        first = self.model.new_bool_var(f"{one.name}<{other.name}")
        active = [operation.active for operation in (one, other) if operation.active is not None]
        for literal in sharing:
            conditions = active if literal is None else [*active, literal]
            self.model.add(one.end <= other.start).only_enforce_if([*conditions, first])
            self.model.add(other.end <= one.start).only_enforce_if([*conditions, ~first])
        if self.frees:
            self.model.add(one.place < other.place).only_enforce_if([*active, first])
            self.model.add(other.place < one.place).only_enforce_if([*active, ~first])


def _longest(problem: Problem) -> float:
    """Seconds that no plan needs more of: all operations one by one."""
    moves = {
        model: max(max(cost.inside, cost.apart) for (of, _, _), cost in problem.moves.items() if of == model)
        for model in {model for model, _, _ in problem.moves}
    }
    calls = sum(max(option.duration for option in call.options) for call in problem.calls)
    return calls + sum(moves.get(str(call.model), 0.0) for call in problem.calls)
