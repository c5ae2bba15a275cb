"""Which calls share devices, without saying which devices: the space half of the class model.

For each non-empty set of calls and each pool an integer counts the devices that exactly those calls use.
That is exact but for contiguity and alignment, so whatever fits in truth fits here.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations, permutations
from math import gcd
from typing import Any

from ortools.sat.python import cp_model

from planner.search.groups import Grouped
from planner.search.problem import Problem

_CLASSES_OF = 10
"""Calls in classes at most; the smallest beyond are taken to need no device, which loosens the model."""
_UNITS = 1 << 20
"""Units that the largest memory is counted in at most: bytes are rounded down, which loosens the model."""


class Space:
    """Variables and constraints on devices and memory.

    `taken[call][i]`: group i is chosen. `names` are the calls that classes tell apart. For two of them
    `together` is true at least where some device is used by both, `sticks_out` at least where the first has
    a device that the other lacks; `shares` only where both share what they hold. With `slack` every device
    may lack as much as the variable `lack` says.
    """

    def __init__(
        self, problem: Problem, view: Grouped, model: cp_model.CpModel, *, slack: bool = False
    ) -> None:
        self.problem, self.view, self.model, self.slack = problem, view, model, slack
        self.taken = {name: [model.new_bool_var(f"{name}.{index}") for index in range(len(groups))]
                      for name, groups in view.groups.items()}  # fmt: skip
        for literals in self.taken.values():
            model.add_exactly_one(literals)
        self.false = model.new_constant(0)
        self.layouts = {name: self._literals(name, "layout") for name in self.taken}
        self.keeps = {name: self._literals(name, "keeps").get(True, self.false) for name in self.taken}
        self.names = self._told_apart()
        self.unit = _unit(view)
        self.lack: Any = model.new_int_var(0, self._most(), "lack") if slack else 0
        self.shares = self._sharing()
        self.own = {name: self.variable(name, [group.own // self.unit for group in self.groups(name)])
                    for name in self.names}  # fmt: skip
        self.active = {name: self.variable(name, [group.active // self.unit for group in self.groups(name)])
                       for name in self.names}  # fmt: skip
        self.held = self._held()
        self.count: dict[tuple[int, int], Any] = {}
        self.present: dict[tuple[int, int], Any] = {}
        for mask in range(1, 1 << len(self.names)):
            self._class(mask)
        self._fill()
        self.together = {pair: self._where({*pair}, set()) for pair in combinations(self.names, 2)}
        self.together |= {(other, one): literal for (one, other), literal in self.together.items()}
        self.sticks_out = {(one, other): self._where({one}, {other})
                           for one, other in permutations(self.names, 2)}  # fmt: skip
        self._link()

    def groups(self, name: str) -> Any:
        """The groups of a call."""
        return self.view.groups[name]

    def inside(self, mask: int) -> list[str]:
        """The calls of a class."""
        return [name for index, name in enumerate(self.names) if mask >> index & 1]

    def variable(self, name: str, values: list[int]) -> Any:
        """What the chosen group of a call has, of a value for each of its groups."""
        if len(set(values)) == 1:
            return values[0]
        domain = cp_model.Domain.from_values(sorted(set(values)))
        variable = self.model.new_int_var_from_domain(domain, "")
        self.model.add(variable == self.sum(name, values))
        return variable

    def sum(self, name: str, values: list[int]) -> Any:
        """The same as an expression."""
        return cp_model.LinearExpr.weighted_sum(self.taken[name], values)

    def _literals(self, name: str, attribute: str) -> dict[Any, Any]:
        """Value of an attribute of groups -> literal: the chosen group of a call has it."""
        found: defaultdict[Any, list[Any]] = defaultdict(list)
        for group, literal in zip(self.groups(name), self.taken[name], strict=True):
            found[getattr(group, attribute)].append(literal)
        literals = {}
        for value, those in found.items():
            literals[value] = those[0] if len(those) == 1 else self.model.new_bool_var("")
            if len(those) > 1:
                self.model.add(sum(those) == literals[value])
        return literals

    def _told_apart(self) -> list[str]:
        """The calls with devices, in the problem's order; the smallest left out where they are too many."""
        least = {name: min(group.size * group.seconds for group in groups)
                 for name, groups in self.view.groups.items()
                 if any(group.size for group in groups)}  # fmt: skip
        large = sorted(least, key=lambda name: -least[name])[:_CLASSES_OF]
        return [name for name in least if name in large]

    def _most(self) -> int:
        """Units beyond which no device can lack anything."""
        bytes_ = sum(max(sum(group.costs[1:]) for group in self.groups(name)) for name in self.names)
        return int(bytes_ // self.unit) + 1

    def _sharing(self) -> dict[tuple[str, str], Any]:
        """Literals for calls of one model that share what they hold: equal layouts here, equal devices in
        `_link`."""
        found = {}
        for one, other in combinations(self.names, 2):
            model = self.problem.call(one).model
            if model is None or model != self.problem.call(other).model:
                continue
            mine, its = self.layouts[one], self.layouts[other]
            literal = self.model.new_bool_var(f"{one}={other}") if mine.keys() & its.keys() else self.false
            for layout in dict.fromkeys([*mine, *its]):
                equal = mine.get(layout, self.false) == its.get(layout, self.false)
                self.model.add(equal).only_enforce_if(literal)
            found[one, other] = found[other, one] = literal
        return found

    def _held(self) -> dict[str, Any]:
        """Call -> static units that count for it: of calls that share what they hold the largest for the
        first, none for the others."""
        static = {name: self.variable(name, [group.static // self.unit for group in self.groups(name)])
                  for name in self.names}  # fmt: skip
        held = {}
        for index, name in enumerate(self.names):
            sharing = [other for other in self.names if (name, other) in self.shares]
            if not sharing:
                held[name] = static[name]
                continue
            top = max(group.static // self.unit for call in (name, *sharing) for group in self.groups(call))
            held[name] = self.model.new_int_var(0, top, f"held.{name}")
            first = [~self.shares[name, other] for other in self.names[:index] if other in sharing]
            self.model.add(held[name] >= static[name]).only_enforce_if(first)
            for other in self.names[index + 1 :]:
                if other in sharing:
                    self.model.add(held[name] >= static[other]).only_enforce_if(
                        [self.shares[name, other], *first]
                    )
        return held

    def _class(self, mask: int) -> None:
        calls = self.inside(mask)
        for pool, size in enumerate(self.view.sizes):
            if not self.slack and not self._may_fit(calls, pool):
                continue
            count = self.model.new_int_var(0, size, f"n{mask}.{pool}")
            present = self.model.new_bool_var(f"z{mask}.{pool}")
            self.model.add(count >= 1).only_enforce_if(present)
            self.model.add(count == 0).only_enforce_if(~present)
            self.count[mask, pool], self.present[mask, pool] = count, present
            room = self.view.memory[pool] // self.unit + self.lack
            held = sum(self.held[name] + self.own[name] for name in calls)
            for name in calls:
                self.model.add(held + self.active[name] <= room).only_enforce_if(present)

    def _may_fit(self, calls: list[str], pool: int) -> bool:
        """Whether the smallest options could be on one device of a pool."""
        least: defaultdict[str | tuple[str], int] = defaultdict(int)
        active, own = 0, 0
        for name in calls:
            groups = [group for group in self.groups(name) if group.counts[pool]]
            if not groups:
                return False
            key = self.problem.call(name).model or (name,)
            least[key] = max(least[key], min(group.static // self.unit for group in groups))
            active = max(active, min(group.active // self.unit for group in groups))
            own += min(group.own // self.unit for group in groups)
        return sum(least.values()) + own + active <= self.view.memory[pool] // self.unit

    def _fill(self) -> None:
        """Each call has its devices, and no pool gives more than it has."""
        for pool, size in enumerate(self.view.sizes):
            here = {mask: count for (mask, of), count in self.count.items() if of == pool}
            self.model.add(sum(here.values()) <= size)
            for index, name in enumerate(self.names):
                mine = sum(count for mask, count in here.items() if mask >> index & 1)
                self.model.add(mine == self.sum(name, [group.counts[pool] for group in self.groups(name)]))

    def _link(self) -> None:
        """What follows from the places: sharing needs equal ones, nested ones do not cross."""
        for (one, other), literal in self.shares.items():
            if literal is not self.false:
                self.model.add_implication(literal, ~self.sticks_out[one, other])
        if self.view.nested:
            for one, other in combinations(self.names, 2):
                out = [~self.sticks_out[one, other], ~self.sticks_out[other, one]]
                self.model.add_bool_or([~self.together[one, other], *out])

    def _where(self, some: set[str], none: set[str]) -> Any:
        """Literal: some device is used by all of some calls, and by none of others."""
        literals = [z for (mask, _), z in self.present.items()
                    if some <= {*self.inside(mask)} and not none & {*self.inside(mask)}]  # fmt: skip
        if not literals:
            return self.false
        literal = self.model.new_bool_var("")
        for present in literals:
            self.model.add_implication(present, literal)
        self.model.add_bool_or([*literals, ~literal])
        return literal


def _unit(view: Grouped) -> int:
    """Bytes that are counted as one: what divides all numbers, or as many as leave few enough units."""
    groups = [group for groups in view.groups.values() for group in groups]
    sizes = {size for group in groups for size in (group.static, group.own, group.active)}
    most = max(view.memory, default=0)
    return max(1, gcd(*view.memory, *sizes) if most < 2 * _UNITS else most // _UNITS)
