"""What is asked of building a problem, and what comes of it: values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.callbytes import CallBytes
from planner.costs import CallCost, Costs
from planner.lengths import Lengths
from planner.memory import Assumptions
from planner.options.ways import Way, Wishes
from planner.profile import Profile
from planner.search import Problem
from realflow.layout import Layout


@dataclass(frozen=True)
class Pin:
    """What a person has fixed of a call. None: the search chooses."""

    layout: Layout | None = None
    place: range | None = None
    wishes: Wishes = field(default_factory=Wishes)
    text: str = ""
    """As it was given, for messages."""


@dataclass(frozen=True)
class Ask:
    """What is asked of the search beside graph and cluster."""

    meshes: str = "any"
    pins: Mapping[str, Pin] = field(default_factory=dict)
    wishes: Wishes = field(default_factory=Wishes)
    profile: Profile | None = None
    assume: Assumptions = field(default_factory=Assumptions)
    function_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Least:
    """The leanest way of a call that was found too large for all devices."""

    way: Way
    kind: str
    needed: CallBytes
    room: int


@dataclass(frozen=True)
class Meaning:
    """What an option of a call stands for. `kind` is that of its devices."""

    way: Way
    pool: int


@dataclass(frozen=True)
class Built:
    """A problem, and what its options mean: `meanings[call][option]`. `costs` has those of each pool."""

    problem: Problem
    meanings: Mapping[str, tuple[Meaning, ...]]
    costs: tuple[Costs, ...]
    lengths: Lengths
    tried: int
    """Ways of running calls that were costed."""
    left_out: int
    """Layouts of calls that fit, for each number of devices, but were left out without proof that no shortest
    plan needs them."""

    def way(self, call: str, option: int) -> Way:
        """How a call runs with an option."""
        return self.meanings[call][option].way

    def cost(self, call: str, option: int) -> CallCost:
        """What an option costs, by parts."""
        meaning = self.meanings[call][option]
        return self.costs[meaning.pool].call(call, meaning.way)


class TooLarge(Exception):
    """No option of a call fits into any device. `least` is the leanest."""

    def __init__(self, call: str, least: Least) -> None:
        super().__init__(call)
        self.call, self.least = call, least
