"""The operations of the class model: when calls and moves start, and what they wait for.

`planner.search.classes` adds what devices do: they run one operation at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ortools.sat.python import cp_model

from planner.search.bounds import ancestors
from planner.search.groups import Grouped
from planner.search.problem import MOVE, Move, Problem
from planner.search.sketches import ticks_of
from planner.search.space import Space

_PAIRS = 40_000
"""Pairs of layouts between which moves are told apart."""


@dataclass(frozen=True)
class Step:
    """An operation of the model: `on` are calls whose devices it takes, `if_` literals that it is there."""

    start: Any
    end: Any
    on: tuple[str, ...]
    if_: tuple[Any, ...] = ()
    last: bool = False


class Operations:
    """Variables of the time half, beside those of `Space`: calls that wait for calls, and moves."""

    def __init__(self, problem: Problem, view: Grouped, horizon: float) -> None:
        self.problem, self.view = problem, view
        self.horizon = ticks_of(problem.devices)
        self.tick = horizon / self.horizon
        self.model = cp_model.CpModel()
        self.space = Space(problem, view, self.model)
        self.before = ancestors(problem)
        self.makespan = self.model.new_int_var(0, self.horizon, "makespan")
        self.seconds = {call.name: self.space.variable(call.name, [self.ticks(group.seconds) for group in
                        view.groups[call.name]]) for call in problem.calls}  # fmt: skip
        self.stage = {call.name: self.model.new_int_var(0, problem.overlap - 1, f"stage.{call.name}")
                      for call in problem.calls}  # fmt: skip
        self.steps: dict[str, Step] = {}
        for call in problem.calls:
            on = (call.name,) if call.name in self.space.names else ()
            self._step(call.name, self.seconds[call.name], on)
        self._precede()
        self.moving: dict[str, Any] = {}
        for name, train in self._users():
            self._move(name, train)
        for name, train in self._followers():
            self._follow(name, train)

    def ticks(self, seconds: float) -> int:
        """Seconds in ticks, rounded down: a hair more than they are must not become one more. What is longer
        than the horizon has no place in any case."""
        return min(self.horizon + 1, int(seconds / self.tick * (1 - 1e-9)))

    def _step(self, what: str, seconds: Any, on: tuple[str, ...], **more: Any) -> Step:
        start = self.model.new_int_var(0, self.horizon, f"start.{what}")
        step = self.steps[what] = Step(start, start + seconds, on, **more)
        self.model.add(step.end <= self.makespan)
        return step

    def _precede(self) -> None:
        """Calls wait for those that they come after, as far as both work on the same step."""
        for call in self.problem.calls:
            for other in call.after:
                waits = self.model.add(self.steps[other].end <= self.steps[call.name].start)
                if self.problem.overlap > 1:
                    self.model.add(self.stage[other] <= self.stage[call.name])
                    apart = self.model.new_bool_var("")
                    waits.only_enforce_if(~apart)
                    self.model.add(self.stage[other] < self.stage[call.name]).only_enforce_if(apart)

    def _users(self) -> list[tuple[str, str]]:
        """Calls of trained models, each with the call that trains it; both told apart by classes."""
        trained = self.problem.trained()
        return self._told_apart({call.name: trained[str(call.model)].name for call in self.problem.calls
                                 if call.model in trained and not call.trains})  # fmt: skip

    def _followers(self) -> list[tuple[str, str]]:
        """Calls of followers, each with the call that trains its leader."""
        trained = self.problem.trained()
        leader = self.problem.follows
        return self._told_apart({call.name: trained[leader[str(call.model)]].name
                                 for call in self.problem.calls if call.model in leader})  # fmt: skip

    def _told_apart(self, pairs: dict[str, str]) -> list[tuple[str, str]]:
        return [pair for pair in pairs.items() if {*pair} <= {*self.space.names}]

    def _move(self, name: str, train: str) -> None:
        """The move of a trained model's weights for a call: not where it shares what the train call holds,
        nor where an earlier call shares what is kept."""
        space = self.space
        ahead = [
            other for other, of in self._users() if of == train and self._index(other) < self._index(name)
        ]
        ways = [space.shares[name, train]]
        brought = {}
        for other in ahead:
            by = brought[other] = self.model.new_bool_var("")
            sharing = [call for call, of in self._users() if of == train and call not in (name, other)]
            self.model.add_implication(by, space.shares[name, other])
            self.model.add_implication(by, self.moving[other])
            self.model.add_bool_or([space.keeps[call] for call in (name, other, *sharing)]).only_enforce_if(
                by
            )
            ways.append(by)
        moving = self.moving[name] = self.model.new_bool_var(f"moving.{name}")
        self.model.add_bool_or([*ways, moving])
        for way in ways:
            self.model.add_implication(way, ~moving)
        step = self._moved(name, train, self.problem.call(name).model, moving)
        self.model.add(step.end <= self.steps[name].start).only_enforce_if(moving)
        for other, by in brought.items():
            self.model.add(self.steps[MOVE + other].end <= self.steps[name].start).only_enforce_if(by)

    def _follow(self, name: str, train: str) -> None:
        """The move into what a follower's call holds, at the end of the step."""
        space, mine = self.space, [call.name for call in self.problem.calls
                                   if call.model == self.problem.call(name).model]  # fmt: skip
        ahead = [other for other in mine if other in space.names and self._index(other) < self._index(name)]
        moving = self.moving[name] = self.model.new_bool_var(f"moving.{name}")
        self.model.add_bool_or([moving, *(space.shares[name, other] for other in ahead)])
        step = self._moved(name, train, self.problem.call(name).model, moving, last=True)
        waits = {train, *(mine if self.problem.overlap == 1 else (name,))}
        for other in sorted(waits):
            self.model.add(self.steps[other].end <= step.start).only_enforce_if(moving)

    def _moved(self, name: str, train: str, of: str | None, moving: Any, *, last: bool = False) -> Step:
        """A move and its duration: by the layouts of both, and whether it leaves the devices of `train`."""
        costs = self._costs(str(of), train, name)
        seconds = self.model.new_int_var(0, self.horizon, f"moves.{name}")
        step = self._step(MOVE + name, seconds, (train, name), if_=(moving,), last=last)
        self.model.add(seconds == 0).only_enforce_if(~moving)
        self.seconds[MOVE + name] = seconds
        leaves = self.space.sticks_out[name, train]
        kinds = [(_least, []), (_apart, [leaves])]
        if any(cost.inside > cost.apart for cost in costs.values()) and all(
            g.size for g in self.view.groups[name]
        ):
            kinds.append((_inside, [~leaves]))
        for source, chosen in self.space.layouts[train].items():
            for cost, when in kinds:
                least = sum(self.ticks(cost(costs[source, into])) * literal
                            for into, literal in self.space.layouts[name].items()
                            if (source, into) in costs)  # fmt: skip
                self.model.add(seconds >= least).only_enforce_if([chosen, moving, *when])
        return step

    def _costs(self, of: str, train: str, name: str) -> dict[tuple[str, str], Move]:
        """Layouts of both calls -> move; none where they are too many, as if moves there took no time."""
        sources, layouts = self.space.layouts[train], self.space.layouts[name]
        if len(sources) * len(layouts) > _PAIRS:
            return {}
        found = {
            (one, other): self.problem.moves.get((of, one, other)) for one in sources for other in layouts
        }
        return {pair: move for pair, move in found.items() if move is not None}

    def _index(self, name: str) -> int:
        return [call.name for call in self.problem.calls].index(name)


def _least(cost: Move) -> float:
    return min(cost.inside, cost.apart)


def _inside(cost: Move) -> float:
    return cost.inside


def _apart(cost: Move) -> float:
    return cost.apart
