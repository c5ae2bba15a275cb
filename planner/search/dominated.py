"""Options that no shortest plan needs: another does the same at no more cost, whatever all other calls do.

Dropping them leaves the shortest step what it is: in any plan that has such an option the other can take its
place, on the same devices (or on some of them), and no operation starts later. That holds for

- seconds, and bytes of each kind: `evaluate` is monotone in all of them;
- layouts: the same one, or one that nothing shares today and whose moves from (or to) every layout take no
  longer (sharing something can only save moves and bytes);
- keeping: what is kept moves once, at a time of its own; what is freed right before each call;
- smaller meshes: for calls that neither move nor share, where every place has one of the smaller inside.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from planner.search.problem import Call, Choice, Option, Placed, Problem


@dataclass(frozen=True)
class Reduced:
    """A problem without them. `kept`: for each call the numbers of its options in the whole problem."""

    problem: Problem
    kept: Mapping[str, tuple[int, ...]]

    def whole(self, choice: Choice) -> Choice:
        """A choice in the numbers of the whole problem."""
        return {name: Placed(self.kept[name][one.option], one.place) for name, one in choice.items()}

    def reduced(self, choice: Choice) -> Choice | None:
        """The reverse; None if the choice has an option or place that is dropped."""
        found = {}
        for name, one in choice.items():
            if one.option not in self.kept[name]:
                return None
            index = self.kept[name].index(one.option)
            if one.place not in self.problem.call(name).options[index].places:
                return None
            found[name] = Placed(index, one.place)
        return found


def undominated(problem: Problem) -> Reduced:
    """The problem without dominated options, and without places where an option does not fit alone. A call
    that fits nowhere keeps what it has."""
    kept, calls = {}, []
    for call in problem.calls:
        fitting = _fitting(problem, call)
        judge = _Judge(problem, call)
        left = judge.best(fitting)
        kept[call.name] = tuple(left)
        calls.append(replace(call, options=tuple(fitting[index] for index in left)))
    return Reduced(replace(problem, calls=tuple(calls)), kept)


def _fitting(problem: Problem, call: Call) -> dict[int, Option]:
    """The options with the places where they fit if nothing else is there."""
    least = min(problem.memory_bytes, default=0)
    fitting: dict[int, Option] = {}
    for index, option in enumerate(call.options):
        need = option.static_bytes + option.own_bytes + option.active_bytes
        if need <= least:
            fitting[index] = option
            continue
        places = tuple(
            place for place in option.places if all(need <= problem.memory_bytes[device] for device in place)
        )
        if places:
            fitting[index] = replace(option, places=places)
    return fitting or dict(enumerate(call.options))


class _Judge:
    """Which options of a call can replace which."""

    def __init__(self, problem: Problem, call: Call) -> None:
        self.problem, self.call = problem, call
        trained, model = problem.trained(), call.model
        others = [
            one for one in problem.calls if one.model == model and one is not call and model is not None
        ]
        self.elsewhere = {option.layout for one in others for option in one.options}
        self.keeping = model in trained and not call.trains
        self.plain = model is None or (not others and model not in trained and model not in problem.follows)
        self.routes: list[tuple[bool, str, str]] = []  # moves from or to this call's layout
        if model in problem.follows:
            leader = trained[problem.follows[str(model)]]
            self.routes += [(False, str(model), option.layout) for option in leader.options]
        if model in trained:
            ends = others if call.trains else [trained[str(model)]]
            self.routes += [(call.trains, str(model), o.layout) for one in ends for o in one.options]
        if call.trains:
            followers = [one for one in problem.calls if problem.follows.get(str(one.model)) == model]
            self.routes += [(True, str(one.model), o.layout) for one in followers for o in one.options]
        self.routes = sorted(set(self.routes))

    def best(self, options: Mapping[int, Option]) -> list[int]:
        """The numbers of those that are left, in order."""
        order = sorted(options, key=lambda index: (*self._costs(options[index]), options[index].size, index))
        left: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index in order:
            option = options[index]
            if not any(self._replaces(options[other], option) for other in self._rivals(left, option)):
                left[option.size][option.layout].append(index)
        return sorted(index for layouts in left.values() for of in layouts.values() for index in of)

    def _rivals(self, left: Mapping[int, Mapping[str, list[int]]], option: Option) -> Iterator[int]:
        """Those that might replace an option."""
        for size in [size for size in left if size <= option.size] if self.plain else [option.size]:
            if option.layout in self.elsewhere:
                yield from left[size].get(option.layout, ())
            else:
                yield from (index for of in left[size].values() for index in of)

    def _costs(self, option: Option) -> tuple[float, ...]:
        if self.plain:
            return option.duration, option.static_bytes + option.own_bytes, option.active_bytes
        return option.duration, option.static_bytes, option.own_bytes, option.active_bytes

    def _replaces(self, one: Option, other: Option) -> bool:
        """Whether the one can stand wherever the other does."""
        return (
            all(mine <= its for mine, its in zip(self._costs(one), self._costs(other), strict=True))
            and (one.keeps or not other.keeps or not self.keeping)
            and (one.layout == other.layout or self._moves_no_longer(one.layout, other.layout))
            and self._covers(one, other)
        )

    def _moves_no_longer(self, one: str, other: str) -> bool:
        if self.plain:
            return True
        for leaves, model, layout in self.routes:
            mine, its = (
                self.problem.moves.get((model, mine, layout) if leaves else (model, layout, mine))
                for mine in (one, other)
            )
            if mine is None or its is None:
                return False
            if mine.inside > its.inside or mine.apart > its.apart:
                return False
        return True

    def _covers(self, one: Option, other: Option) -> bool:
        """Whether each place of the other is one of the one, or (plain calls) has one inside."""
        if one.places is other.places or one.places == other.places:
            return True
        if not self.plain or not one.size:
            return {*other.places} <= {*one.places}
        starts = sorted(place.start for place in one.places)
        for place in other.places:
            index = bisect_left(starts, place.start)
            if index == len(starts) or starts[index] + one.size > place.stop:
                return False
        return True
