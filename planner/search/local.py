"""Good plans soon: annealing over options, places, order and stages, from several greedy starts."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from random import Random

from planner.search.problem import Call, Choice, Order, Problem
from planner.search.quick import Draft, Quick

_HOT, _COLD = 0.1, 0.0005
"""How much worse a plan may be that is accepted one time in e, at first and at last."""
_TRIAL = 0.8
"""Part of the rounds that all starts share; the best plan has the others."""
_AGAIN = 0.3
"""How often a change comes with another: some plans are better only by several."""
_CHAIN = 8_000
"""Rounds from one start, where there are enough for all: many short searches find more than few long ones."""


def improve(
    problem: Problem, *, seed: int, rounds: int, start: tuple[Choice, Order] | None = None
) -> tuple[Choice, Order] | None:
    """The best plan that so many costed plans lead to, no worse than `start`; None if none that fits is
    found. The same on any machine for the same seed and rounds."""
    search = _Annealing(problem, Random(seed))
    drafts = search.starts() if start is None else [search.quick.draft(*start), *search.starts()]
    chains = max(len(drafts), int(rounds * _TRIAL) // _CHAIN)
    for chain in range(chains):
        search.anneal(drafts[chain % len(drafts)], max(1, int(rounds * _TRIAL) // chains), _HOT)
    if (best := search.best) is not None:
        search.anneal(best, max(1, rounds - search.rounds), _HOT / 4)
    return None if search.best is None else search.quick.plan(search.best)


class _Options:
    """The options of a call by number of devices, each fastest first, and the starts of their places."""

    def __init__(self, call: Call) -> None:
        found = defaultdict(list)
        for index, option in enumerate(call.options):
            found[option.size].append(index)
        self.sizes = sorted(found)
        self.of = {size: sorted(of, key=lambda one: call.options[one].duration) for size, of in found.items()}
        self.options = call.options
        starts: dict[int, list[int]] = {}  # options mostly have the very same tuples of places
        for option in call.options:
            if id(option.places) not in starts:
                starts[id(option.places)] = sorted(place.start for place in option.places)
        self.starts = [starts[id(option.places)] for option in call.options]

    def near(self, option: int, start: int) -> int:
        """The start of the option's place that is nearest."""
        starts = self.starts[option]
        index = bisect_left(starts, start)
        return min(starts[max(0, index - 1) : index + 1], key=lambda one: abs(one - start))

    def fits(self, option: int, start: int) -> bool:
        """Whether the option has a place there."""
        starts = self.starts[option]
        index = bisect_left(starts, start)
        return index < len(starts) and starts[index] == start


class _Annealing:
    """One search: what was best, and how plans are changed."""

    def __init__(self, problem: Problem, rng: Random) -> None:
        self.problem, self.quick, self.rng = problem, Quick(problem), rng
        self.options = [_Options(call) for call in problem.calls]
        self.calls = range(self.quick.count)
        self.best: Draft | None = None
        self.seconds = math.inf
        self.rounds = 0
        self.changes = [self._reoption, self._reoption, self._move, self._boundary, self._reorder, self._join]
        self.changes += [self._split]
        if problem.overlap > 1:
            self.changes.append(self._restage)

    def starts(self) -> list[Draft]:
        """All calls on as many devices as they can take; the fastest option of each; the least bytes of each;
        two parts: what trains its model, and what does not."""
        quick = self.quick
        order = [*quick.topological, *(quick.count + call for call in quick.topological)]
        wide = [one.of[one.sizes[-1]][0] for one in self.options]
        fast = [min((i for of in one.of.values() for i in of), key=lambda i: one.options[i].duration)
                for one in self.options]  # fmt: skip
        small = [min(range(len(one.options)), key=lambda i: _bytes(one, i)) for one in self.options]
        drafts = [self._draft(options, [0] * quick.count, order) for options in (wide, fast, small)]
        trains = [call.trains for call in self.problem.calls]
        for part in (1, 2, 3) if self.problem.overlap > 1 else (2,):
            first = self.problem.devices * part // 4  # for what trains; the others have the rest
            rooms = [first if train else self.problem.devices - first for train in trains]
            sizes = [
                max((size for size in one.sizes if size <= room), default=one.sizes[0])
                for one, room in zip(self.options, rooms, strict=True)
            ]
            options = [one.of[size][0] for one, size in zip(self.options, sizes, strict=True)]
            drafts.append(self._draft(options, [first * (not train) for train in trains], order))
            if self.problem.overlap > 1:
                drafts[-1].stage = [int(train) for train in trains]
        return drafts

    def anneal(self, draft: Draft, rounds: int, hot: float) -> None:
        """Change a plan at random; keep what is better, and what is worse the less often the worse it is."""
        rng, plan = self.rng, draft
        energy = self._energy(plan)
        for index in range(rounds):
            heat = hot * (_COLD / hot) ** (index / rounds)
            other = plan.copy()
            if not rng.choice(self.changes)(other):
                continue
            while rng.random() < _AGAIN:
                rng.choice(self.changes)(other)
            new = self._energy(other)
            if new <= energy or rng.random() < math.exp((energy - new) / (heat * energy)):
                plan, energy = other, new

    def _energy(self, draft: Draft) -> float:
        self.rounds += 1
        seconds, lack = self.quick.cost(draft)
        if not lack and seconds < self.seconds:
            self.best, self.seconds = draft.copy(), seconds
        return seconds * (1 + 4 * lack / max(1, self.quick.least))

    def _draft(self, options: list[int], starts: list[int], order: list[int]) -> Draft:
        low = [
            one.near(index, start) for one, index, start in zip(self.options, options, starts, strict=True)
        ]
        high = [
            at + one.options[index].size for one, index, at in zip(self.options, options, low, strict=True)
        ]
        return Draft(list(options), low, high, [0] * self.quick.count, list(order))

    def _set(self, draft: Draft, call: int, option: int, start: int) -> None:
        draft.option[call], draft.low[call] = option, start
        draft.high[call] = start + self.options[call].options[option].size

    def _some(self, call: int, size: int) -> int:
        """An option of that size, the faster the more often."""
        of = self.options[call].of[size]
        return (
            of[min(len(of) - 1, int(self.rng.expovariate(1.0)))]
            if self.rng.random() < 0.8
            else self.rng.choice(of)
        )

    def _place(self, draft: Draft, call: int, option: int) -> int:
        """A start for an option: beside another call, where it is, or anywhere."""
        rng, mine = self.rng, self.options[call]
        if rng.random() < 0.1:
            return rng.choice(mine.starts[option])
        if rng.random() < 0.4:
            return mine.near(option, draft.low[call])
        size = mine.options[option].size
        other = rng.choice(self.calls)
        at = rng.choice(
            (draft.low[other], draft.high[other], draft.low[other] - size, draft.high[other] - size)
        )
        return mine.near(option, at)

    def _reoption(self, draft: Draft) -> bool:
        """Another option for a call."""
        rng = self.rng
        call = rng.choice(self.calls)
        mine = self.options[call]
        if rng.random() < 0.5:
            near = bisect_left(mine.sizes, draft.high[call] - draft.low[call]) + rng.choice((-1, 0, 0, 1))
            size = mine.sizes[min(max(near, 0), len(mine.sizes) - 1)]
        else:
            size = rng.choice(mine.sizes)
        option = self._some(call, size)
        self._set(draft, call, option, self._place(draft, call, option))
        return True

    def _move(self, draft: Draft) -> bool:
        """A call elsewhere, or two calls' places exchanged."""
        rng = self.rng
        call = rng.choice(self.calls)
        if rng.random() < 0.7:
            start = self._place(draft, call, draft.option[call])
            changed = start != draft.low[call]
            self._set(draft, call, draft.option[call], start)
            return changed
        other, mine = rng.choice(self.calls), draft.low[call]
        self._set(
            draft, call, draft.option[call], self.options[call].near(draft.option[call], draft.low[other])
        )
        self._set(draft, other, draft.option[other], self.options[other].near(draft.option[other], mine))
        return call != other

    def _boundary(self, draft: Draft) -> bool:
        """Calls that end or begin at some device do so at another: what one side gains the other loses."""
        rng = self.rng
        inner = sorted({*draft.low, *draft.high} - {0, self.problem.devices})
        if not inner:
            return False
        at = rng.choice(inner)
        touching = [call for call in self.calls if at in (draft.low[call], draft.high[call])]
        call = rng.choice(touching)
        option = self._some(call, rng.choice(self.options[call].sizes))
        size = self.options[call].options[option].size
        to = draft.low[call] + size if draft.high[call] == at else draft.high[call] - size
        for one in touching:
            low, high = (draft.low[one], to) if draft.high[one] == at else (to, draft.high[one])
            if high > low and high - low in self.options[one].of:
                new = self._some(one, high - low)
                if self.options[one].fits(new, low):
                    self._set(draft, one, new, low)
        return True

    def _split(self, draft: Draft) -> bool:
        """Two calls side by side."""
        rng = self.rng
        one, other = rng.choice(self.calls), rng.choice(self.calls)
        if one == other:
            return False
        room = max(draft.high[one], draft.high[other]) - (low := min(draft.low[one], draft.low[other]))
        sizes = [size for size in self.options[one].sizes if size < room]
        if not sizes:
            return False
        size = rng.choice(sizes)
        rest = [more for more in self.options[other].sizes if more <= room - size]
        if not rest:
            return False
        first, second = (
            self._some(one, size),
            self._some(other, rest[-1] if rng.random() < 0.7 else rng.choice(rest)),
        )
        self._set(draft, one, first, self.options[one].near(first, low))
        self._set(draft, other, second, self.options[other].near(second, low + size))
        return True

    def _reorder(self, draft: Draft) -> bool:
        """An operation earlier or later."""
        order, rng = draft.order, self.rng
        order.insert(rng.randrange(len(order)), order.pop(rng.randrange(len(order))))
        return True

    def _join(self, draft: Draft) -> bool:
        """A call where another of its model is, with the same layout if it can have that."""
        call = self.rng.choice(self.calls)
        others = [other for other in self.quick.alike[call] if other != call]
        if not others:
            return False
        other, mine = self.rng.choice(others), self.options[call]
        layout = self.problem.calls[other].options[draft.option[other]].layout
        size = draft.high[other] - draft.low[other]
        alike = [one for one in mine.of.get(size, ()) if mine.options[one].layout == layout
                 and mine.fits(one, draft.low[other])]  # fmt: skip
        if not alike:
            return False
        self._set(draft, call, self.rng.choice(alike), draft.low[other])
        return True

    def _restage(self, draft: Draft) -> bool:
        """A call works on an older step, or a newer one."""
        call = self.rng.choice(self.calls)
        draft.stage[call] = self.rng.randrange(self.problem.overlap)
        return True


def _bytes(options: _Options, index: int) -> int:
    option = options.options[index]
    return option.static_bytes + option.own_bytes + option.active_bytes
