"""What is searched: calls, the options of each, and what they cost. Values only.

The search knows no models, no layouts and no hardware: an option is a length of device runs, seconds and
bytes. `planner.search.evaluate` says what a choice of options and an order of operations cost; search,
bound, enumerator and simulator all mean that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Option:
    """One way to run a call.

    `places` are the runs of devices that it may take, all of one length (`range(0)` alone: it takes no
    device). It runs for `seconds`, and `offload_seconds` more for what comes from host memory before and
    goes back after. Each of its devices holds `static_bytes` (weights) and `own_bytes` (of this call alone:
    optimizer states, a cache) all the time, and `active_bytes` more while it runs.

    `layout` tells what reallocation distinguishes: calls of one model with equal layouts at one place share
    what they hold there (of their static bytes the largest counts). Where no call that shares it
    `keeps` it, it is let go after each of them, and weights of a trained model arrive anew right before each
    (then `active_bytes` count them).
    """

    places: tuple[range, ...]
    seconds: float
    static_bytes: int = 0
    active_bytes: int = 0
    layout: str = ""
    keeps: bool = True
    offload_seconds: float = 0.0
    own_bytes: int = 0

    @property
    def size(self) -> int:
        """Number of devices."""
        return len(self.places[0])

    @property
    def duration(self) -> float:
        """Seconds for which its devices are taken."""
        return self.seconds + self.offload_seconds


@dataclass(frozen=True)
class Call:
    """A call of a step: it starts when the calls `after` which it comes have ended. At most one call of
    a model `trains` it."""

    name: str
    options: tuple[Option, ...]
    after: tuple[str, ...] = ()
    model: str | None = None
    trains: bool = False


@dataclass(frozen=True)
class Move:
    """Seconds to move a model's weights from one layout to another: where the destination's devices all are
    among the source's (`inside`), and where they are not (`apart`)."""

    inside: float
    apart: float


@dataclass(frozen=True)
class Problem:
    """A step to be planned.

    `memory_bytes` has one number for each device. `moves` maps (model, layout of its train call, layout
    of another call) to seconds; what equals the train call's layout and place needs no move. `follows` maps
    a model to the trained one that it follows: at the end of a step weights go from there into every layout
    and place of the follower; `moves` then has the follower's name. `overlap` is how many steps may be under
    way at once (1: synchronous).
    """

    memory_bytes: tuple[int, ...]
    calls: tuple[Call, ...]
    moves: Mapping[tuple[str, str, str], Move] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)
    overlap: int = 1

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.memory_bytes)

    def call(self, name: str) -> Call:
        """The call of that name."""
        return next(call for call in self.calls if call.name == name)

    def trained(self) -> dict[str, Call]:
        """Model -> the call that trains it."""
        return {call.model: call for call in self.calls if call.trains and call.model}


@dataclass(frozen=True)
class Placed:
    """The option that a call runs with (its index among the call's), and where."""

    option: int
    place: range


Choice = Mapping[str, Placed]
"""Call -> how and where it runs."""


@dataclass(frozen=True)
class Slot:
    """A place in the order of a step: a call, or the move of weights `MOVE + call`, and how many
    steps behind the newest it works (always 0 in a synchronous graph)."""

    what: str
    stage: int = 0


MOVE = "move:"

Order = tuple[Slot, ...]
"""All calls of a step, each once. A move that is not named comes right before the first call that needs it;
one that brings what is let go after each call always does, and is not named."""


@dataclass(frozen=True)
class Entry:
    """One operation on the timeline: a call, or `MOVE` and the call that needs the weights. `devices` are
    runs that do not overlap."""

    what: str
    devices: tuple[range, ...]
    start: float
    end: float
    stage: int = 0


@dataclass(frozen=True)
class Timeline:
    """Operations in the order in which they were placed, and the seconds of a step (the period, where steps
    overlap)."""

    entries: tuple[Entry, ...]
    makespan: float


@dataclass(frozen=True)
class Solution:
    """The best plan found, and how much better any plan could be.

    No plan of the problem has a makespan below `bound`; `gap` is the part of the makespan above it.
    `considered` is the number of (option, place) pairs of all calls before any were dropped.
    """

    choice: Choice
    order: Order
    timeline: Timeline
    makespan: float
    bound: float
    considered: int

    @property
    def gap(self) -> float:
        """From 0 (proven best) to 1."""
        return max(0.0, 1.0 - self.bound / self.makespan) if self.makespan > 0 else 0.0


@dataclass(frozen=True)
class Work:
    """How much a search may do: deterministic seconds of the solver, and rounds of local search. The
    same seed and work give the same solution on any machine."""

    solver: float = 20.0
    rounds: int = 20_000


class Infeasible(ValueError):
    """No choice of options fits. `calls` are calls that cannot be placed together, `short` the bytes that
    the fullest device lacks in the best choice that was found."""

    def __init__(self, calls: tuple[str, ...], short: int) -> None:
        super().__init__(f"{', '.join(calls)} cannot be placed together: {short} bytes too few")
        self.calls, self.short = calls, short
