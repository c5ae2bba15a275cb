"""Which devices each call takes: the space half of the exact model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import reduce
from math import gcd
from typing import Any

from ortools.sat.python import cp_model

from planner.search.problem import Call, Choice, Option, Placed, Problem

_BITS = 26
"""The units of all bytes together: below 2 to this power, for the reason that `times._BITS` has."""
Key = tuple[str, int, int]
"""A layout, and a run of devices."""


class Positions:
    """A literal for every option at every place, and what follows from them on devices and memory.

    `together(a, b)` and `sticks_out(a, b)` are literals that are true at least where some device is used by
    both, and where a has one that b lacks; `shared(a, b)` (calls of one model) is true exactly where both
    share what they hold.
    """

    def __init__(
        self, problem: Problem, model: cp_model.CpModel, *, slack: bool = False, tight: bool = False
    ) -> None:
        """With `slack`, devices may lack up to `self.lack` units of bytes each. Where bytes are too many to
        be counted one by one, units are rounded down (what fits in truth fits here), with `tight` up (the
        reverse)."""
        self.problem, self.model = problem, model
        self.pairs = {call.name: _pairs(call) for call in problem.calls}
        self.taken = {
            name: [model.new_bool_var(f"{name}@{pair.option}:{pair.place.start}") for pair in pairs]
            for name, pairs in self.pairs.items()
        }
        for literals in self.taken.values():
            model.add_exactly_one(literals)
        self.uses = {call.name: self._uses(call) for call in problem.calls}
        self._layouts: dict[str, dict[str, Any]] = {}
        self._known: dict[tuple[str, str, str], Any] = {}
        most = sum(max(map(_most_bytes, call.options)) for call in problem.calls)
        self.unit, self.up = _unit(problem, most, problem.memory_bytes if slack else ()), tight
        self.lack: Any = model.new_int_var(0, -(-most // self.unit), "lack") if slack else 0
        self._fit()

    def choice(self, solver: cp_model.CpSolver) -> Choice:
        """What a solver chose."""
        return {
            name: next(p for p, literal in zip(pairs, self.taken[name], strict=True) if solver.value(literal))
            for name, pairs in self.pairs.items()
        }

    def sum(self, name: str, values: list[int]) -> Any:
        """What the chosen option of a call has, of a value for each of its options."""
        return cp_model.LinearExpr.weighted_sum(
            self.taken[name], [values[pair.option] for pair in self.pairs[name]]
        )

    def load(self, values: dict[str, list[int]]) -> list[Any]:
        """The same for each device, over the calls that use it."""
        loads = []
        for device in range(self.problem.devices):
            on = [
                (literal, values[name][pair.option])
                for name, pairs in self.pairs.items()
                for pair, literal in zip(pairs, self.taken[name], strict=True)
                if device in pair.place
            ]
            loads.append(cp_model.LinearExpr.weighted_sum([one for one, _ in on], [v for _, v in on]))
        return loads

    def layouts(self, name: str) -> dict[str, Any]:
        """Layout -> literal: a call runs with it."""
        if name not in self._layouts:
            found = defaultdict(list)
            options = self.problem.call(name).options
            for pair, literal in zip(self.pairs[name], self.taken[name], strict=True):
                found[options[pair.option].layout].append(literal)
            self._layouts[name] = {layout: self.any(of, f"{name}:{layout}") for layout, of in found.items()}
        return self._layouts[name]

    def keeps(self, name: str) -> Any:
        """Whether a call keeps what it holds: a sum of literals, 0 or 1."""
        return self.sum(name, [int(option.keeps) for option in self.problem.call(name).options])

    def together(self, one: str, other: str) -> Any:
        """Literal: some device is used by both."""
        one, other = sorted((one, other))
        if ("&", one, other) not in self._known:
            literal = self._known["&", one, other] = self.model.new_bool_var(f"{one}&{other}")
            for mine, its in zip(self.uses[one], self.uses[other], strict=True):
                self.model.add_bool_or(~mine, ~its, literal)
        return self._known["&", one, other]

    def sticks_out(self, one: str, other: str) -> Any:
        """Literal: one has a device that the other lacks."""
        if ("-", one, other) not in self._known:
            literal = self._known["-", one, other] = self.model.new_bool_var(f"{one}-{other}")
            out = []
            for device, (mine, its) in enumerate(zip(self.uses[one], self.uses[other], strict=True)):
                self.model.add_bool_or(~mine, its, literal)
                out.append(self.model.new_bool_var(f"{one}-{other}@{device}"))
                self.model.add_implication(out[-1], mine)
                self.model.add_implication(out[-1], ~its)
            self.model.add_bool_or(*out, ~literal)
        return self._known["-", one, other]

    def shared(self, one: str, other: str) -> Any:
        """Literal: equal layouts at equal places."""
        one, other = sorted((one, other))
        if ("=", one, other) not in self._known:
            literal = self._known["=", one, other] = self.model.new_bool_var(f"{one}={other}")
            mine, its = self._keys(one), self._keys(other)
            for key in mine.keys() | its.keys():
                left, right = sum(mine.get(key, [])), sum(its.get(key, []))
                self.model.add(left == right).only_enforce_if(literal)
                if key in mine and key in its:
                    self.model.add(left + right <= 1 + literal)
        return self._known["=", one, other]

    def any(self, literals: list[Any], name: str) -> Any:
        """A literal for the sum of literals of which at most one is true."""
        if len(literals) == 1:
            return literals[0]
        literal = self.model.new_bool_var(name)
        self.model.add(sum(literals) == literal)
        return literal

    def _uses(self, call: Call) -> list[Any]:
        """For each device the literal that a call uses it."""
        on: dict[tuple[int, ...], Any] = {}
        uses = []
        for device in range(self.problem.devices):
            mine = tuple(i for i, pair in enumerate(self.pairs[call.name]) if device in pair.place)
            if mine not in on:
                literals = [self.taken[call.name][index] for index in mine]
                on[mine] = self.any(literals, f"{call.name}@{device}") if mine else self.model.new_constant(0)
            uses.append(on[mine])
        return uses

    def _keys(self, name: str) -> dict[Key, list[Any]]:
        found = defaultdict(list)
        options = self.problem.call(name).options
        for pair, literal in zip(self.pairs[name], self.taken[name], strict=True):
            found[options[pair.option].layout, pair.place.start, pair.place.stop].append(literal)
        return dict(found)

    def _fit(self) -> None:
        """Memory: on each device what is held, once for calls that share it, and the largest active."""
        calls = self.problem.calls
        static = {call.name: [self._units(option.static_bytes) for option in call.options] for call in calls}
        active = {call.name: [self._units(option.active_bytes) for option in call.options] for call in calls}
        own = {call.name: [self._units(option.own_bytes) for option in call.options] for call in calls}
        held = {call.name: self._held(call, static) for call in calls}
        for device, memory in enumerate(self.problem.memory_bytes):
            room = memory // self.unit + self.lack
            need, top = [], self.model.new_int_var(0, max(map(max, active.values())), f"active{device}")
            for call in calls:
                self.model.add(top >= self._on(call.name, device, active))
                need.append(self._on(call.name, device, own))
                if held[call.name] is None:
                    need.append(self._on(call.name, device, static))
                else:
                    need.append(self.model.new_int_var(0, sum(map(max, static.values())), f"held{device}"))
                    self.model.add(need[-1] >= held[call.name]).only_enforce_if(self.uses[call.name][device])
            self.model.add(sum(need) + top <= room)

    def _units(self, size: int) -> int:
        return -(-size // self.unit) if self.up else size // self.unit

    def _on(self, name: str, device: int, values: dict[str, list[int]]) -> Any:
        on = [
            (literal, values[name][pair.option])
            for pair, literal in zip(self.pairs[name], self.taken[name], strict=True)
            if device in pair.place
        ]
        return cp_model.LinearExpr.weighted_sum([one for one, _ in on], [value for _, value in on])

    def _held(self, call: Call, static: dict[str, list[int]]) -> Any:
        """Units that count for a call on each of its devices, where they depend on other calls: for the first
        of those that share what they hold the largest, for the others none."""
        model = self.model
        names = [one.name for one in self.problem.calls if one.model == call.model]
        mine = {key[0] for key in self._keys(call.name)}
        names = [one for one in names if one == call.name or mine & {key[0] for key in self._keys(one)}]
        if call.model is None or len(names) == 1:
            return None
        held = model.new_int_var(0, max(max(static[name]) for name in names), f"held.{call.name}")
        place = names.index(call.name)
        first = [~self.shared(call.name, other) for other in names[:place]]
        model.add(held >= self.sum(call.name, static[call.name])).only_enforce_if(first)
        for other in names[place + 1 :]:
            sharing = [self.shared(call.name, other), *first]
            model.add(held >= self.sum(other, static[other])).only_enforce_if(sharing)
        return held


def _pairs(call: Call) -> list[Placed]:
    return [Placed(index, place) for index, option in enumerate(call.options) for place in option.places]


def _unit(problem: Problem, most: int, memory: Iterable[int]) -> int:
    """The largest unit of which all numbers of bytes are multiples, or one that makes `most` small enough for
    the solver (see `times._BITS`)."""
    options = [option for call in problem.calls for option in call.options]
    sizes = {size for o in options for size in (o.static_bytes, o.own_bytes, o.active_bytes)}
    exact = max(1, reduce(gcd, (*memory, *sizes), 0))
    return exact if most >> _BITS < exact else (most >> _BITS) + 1


def _most_bytes(option: Option) -> int:
    return option.static_bytes + option.own_bytes + option.active_bytes
