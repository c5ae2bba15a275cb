"""What a plan costs, quickly: the same as `evaluate` and `misfits`, for hundreds of thousands of plans.

Devices are never walked through: the ends of all runs cut them into at most twice as many segments as
there are calls, and a run is a set of segments, kept as bits of an integer.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.search.problem import MOVE, Choice, Order, Placed, Problem, Slot

Facts = tuple[float, int, int, int, str, bool]
"""Of an option: seconds, static, own and active bytes, layout, whether it keeps."""


@dataclass
class Draft:
    """A plan by numbers of calls: option, run of devices from `low` to below `high`, stage, and a permutation
    of operations (the call `c`, or `len(calls) + c` for the move that it would need). What comes too early
    in it waits for what it needs; moves that are not needed are passed over."""

    option: list[int]
    low: list[int]
    high: list[int]
    stage: list[int]
    order: list[int]

    def copy(self) -> Draft:
        """Another that can be changed."""
        return Draft(self.option[:], self.low[:], self.high[:], self.stage[:], self.order[:])


class Quick:
    """The costs of a problem's plans."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.calls = problem, problem.calls
        number = {call.name: index for index, call in enumerate(problem.calls)}
        self.count = len(problem.calls)
        self.after = [[number[before] for before in call.after] for call in problem.calls]
        self.topological = self._topological()
        self.options = [
            [
                (o.duration, o.static_bytes, o.own_bytes, o.active_bytes, o.layout, o.keeps)
                for o in call.options
            ]
            for call in problem.calls
        ]
        trained = {model: number[call.name] for model, call in problem.trained().items()}
        self.home = [-1 if call.trains or call.model is None else trained.get(call.model, -1)
                     for call in problem.calls]  # fmt: skip
        leaders = {model: trained[leader] for model, leader in problem.follows.items()}
        self.lead = [-1 if call.model is None else leaders.get(call.model, -1) for call in problem.calls]
        self.alike = [
            [other for other in range(self.count) if call.model and problem.calls[other].model == call.model]
            for call in problem.calls
        ]
        self.users = [call for call in range(self.count) if self.home[call] >= 0]
        self.followers = [call for call in range(self.count) if self.lead[call] >= 0]
        memory = problem.memory_bytes
        self.steps = [0, *(d for d in range(1, len(memory)) if memory[d] != memory[d - 1]), len(memory)]
        self.least = min(memory, default=0)

    def cost(self, draft: Draft, slots: list[Slot] | None = None) -> tuple[float, int]:
        """Seconds of a step, and bytes that the fullest device lacks. Adds the order's slots to `slots`."""
        points = sorted({*draft.low, *draft.high, *self.steps})
        bit = {point: 1 << index for index, point in enumerate(points)}
        masks = [bit[high] - bit[low] for low, high in zip(draft.low, draft.high, strict=True)]
        chosen = [options[index] for options, index in zip(self.options, draft.option, strict=True)]
        stages = self._stages(draft) if self.problem.overlap > 1 else draft.stage
        schedule = _Schedule(self, masks, [one[0] for one in chosen], stages, slots)
        schedule.bring, schedule.moving, schedule.late = self._moves(draft, chosen)
        return schedule.run(draft.order), self._lack(draft, points, masks, chosen)

    def plan(self, draft: Draft) -> tuple[Choice, Order]:
        """A draft as `evaluate` takes it."""
        slots: list[Slot] = []
        self.cost(draft, slots)
        choice = {
            call.name: Placed(draft.option[index], range(draft.low[index], draft.high[index]))
            for index, call in enumerate(self.calls)
        }
        return choice, tuple(slots)

    def draft(self, choice: Choice, order: Order) -> Draft:
        """The reverse."""
        placed = [choice[call.name] for call in self.calls]
        number = {call.name: index for index, call in enumerate(self.calls)}
        stages = {slot.what: slot.stage for slot in order}
        sequence = [
            number[slot.what.removeprefix(MOVE)] + self.count * slot.what.startswith(MOVE) for slot in order
        ]
        sequence += [one for one in range(2 * self.count) if one not in sequence]
        return Draft(
            [one.option for one in placed],
            [one.place.start for one in placed],
            [one.place.stop for one in placed],
            [stages[call.name] for call in self.calls],
            sequence,
        )

    def _topological(self) -> list[int]:
        order: list[int] = []
        while len(order) < self.count:
            order += [
                call for call in range(self.count)
                if call not in order and all(before in order for before in self.after[call])
            ]  # fmt: skip
        return order

    def _stages(self, draft: Draft) -> list[int]:
        """No call at a stage before what it comes after."""
        stages = draft.stage[:]
        for call in self.topological:
            for before in self.after[call]:
                stages[call] = max(stages[call], stages[before])
        return stages

    def _moves(self, draft: Draft, chosen: list[Facts]) -> tuple[dict[int, int], dict[int, float], set[int]]:
        """Call -> the call whose move brings its weights; seconds of the moves; those that are late."""
        bring: dict[int, int] = {}
        seconds: dict[int, float] = {}
        late: set[int] = set()
        low, high = draft.low, draft.high
        for call in self.users:
            layout, train = chosen[call][4], self.home[call]
            if layout == chosen[train][4] and low[call] == low[train] and high[call] == high[train]:
                continue
            first, kept = call, False
            for other in self.alike[call]:
                if chosen[other][4] == layout and low[other] == low[call] and high[other] == high[call]:
                    first = min(first, other)
                    kept = kept or chosen[other][5]
            bring[call] = first if kept else call
            if bring[call] == call:
                seconds[call] = self._move(draft, chosen, call, train)
                if not kept:
                    late.add(call)
        for call in self.followers:
            layout = chosen[call][4]
            if not any(
                other < call
                and chosen[other][4] == layout
                and low[other] == low[call]
                and high[other] == high[call]
                for other in self.alike[call]
            ):
                seconds[call] = self._move(draft, chosen, call, self.lead[call])
        return bring, seconds, late

    def _move(self, draft: Draft, chosen: list[Facts], call: int, train: int) -> float:
        cost = self.problem.moves[str(self.calls[call].model), chosen[train][4], chosen[call][4]]
        low, high = draft.low, draft.high
        within = low[call] == high[call] or (low[train] <= low[call] and high[call] <= high[train])
        return cost.inside if within else cost.apart

    def _lack(
        self,
        draft: Draft,
        points: list[int],
        masks: list[int],
        chosen: list[Facts],
    ) -> int:
        if sum(one[1] + one[2] + one[3] for one in chosen) <= self.least:
            return 0
        static = [one[1] for one in chosen]
        for call, alike in enumerate(self.alike):
            for other in alike:
                if (
                    other < call
                    and static[other] >= 0
                    and chosen[other][4] == chosen[call][4]
                    and draft.low[other] == draft.low[call]
                    and draft.high[other] == draft.high[call]
                ):
                    static[other], static[call] = max(static[other], static[call]), -1
                    break
        lacks = 0
        for index in range(len(points) - 1):
            need = top = 0
            for mask, held, one in zip(masks, static, chosen, strict=True):
                if mask >> index & 1:
                    need += (held if held > 0 else 0) + one[2]
                    if one[3] > top:
                        top = one[3]
            lack = need + top - self.problem.memory_bytes[points[index]]
            if lack > lacks:
                lacks = lack
        return lacks


class _Schedule:
    """Operations placed one by one, each as early as it can."""

    def __init__(
        self,
        quick: Quick,
        masks: list[int],
        seconds: list[float],
        stages: list[int],
        slots: list[Slot] | None,
    ) -> None:
        self.quick, self.masks, self.seconds, self.stages, self.slots = quick, masks, seconds, stages, slots
        self.bring: dict[int, int] = {}
        self.moving: dict[int, float] = {}
        self.late: set[int] = set()
        self.ended: dict[int, float] = {}
        self.placed: list[tuple[int, float]] = []
        self.last = quick.problem.overlap - 1

    def run(self, order: list[int]) -> float:
        """The makespan."""
        ended, count, waiting = self.ended, self.quick.count, []
        for one in order:
            if one in ended:
                continue
            call = one - count
            if call < 0:
                self.call(one)
            elif call not in self.moving or call in self.late:
                continue
            elif self.quick.lead[call] < 0:
                self.move(call, 0.0)
            elif not self.follow(call):
                waiting.append(call)
        for call in waiting:
            self.follow(call)
        return max(ended.values(), default=0.0)

    def call(self, call: int) -> None:
        """A call, after what it waits for."""
        ended, stages, ready = self.ended, self.stages, 0.0
        for before in self.quick.after[call]:
            if stages[before] == stages[call]:
                if before not in ended:
                    self.call(before)
                ready = max(ready, ended[before])
        if call in self.bring:
            move = self.quick.count + self.bring[call]
            if move not in ended:
                self.move(self.bring[call], 0.0)
            ready = max(ready, ended[move])
        ended[call] = self._place(self.masks[call], ready, self.seconds[call])
        if self.slots is not None:
            self.slots.append(Slot(self.quick.calls[call].name, stages[call]))

    def move(self, call: int, ready: float) -> None:
        """The move of a call's weights."""
        quick = self.quick
        follows = quick.lead[call] >= 0
        mask = self.masks[call] | self.masks[quick.lead[call] if follows else quick.home[call]]
        self.ended[quick.count + call] = self._place(mask, ready, self.moving[call])
        if self.slots is not None and call not in self.late:
            self.slots.append(Slot(MOVE + quick.calls[call].name, self.last if follows else 0))

    def follow(self, call: int) -> bool:
        """The move into a follower, unless what it waits for is not there yet. It belongs to the oldest step,
        and so waits for the fewest."""
        waits = [
            one for one in (self.quick.lead[call], *self.quick.alike[call]) if self.stages[one] == self.last
        ]
        if any(one not in self.ended for one in waits):
            return False
        self.move(call, max((self.ended[one] for one in waits), default=0.0))
        return True

    def _place(self, mask: int, ready: float, seconds: float) -> float:
        for other, end in self.placed:
            if end > ready and other & mask:
                ready = end
        self.placed.append((mask, ready + seconds))
        return ready + seconds
