"""What a call costs: seconds, and what they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.rates import Seconds, Source, worse


@dataclass(frozen=True)
class CallCost:
    """Seconds of a call, from the moment at which its inputs and weights are there until it has ended.

    `parts` say what they are made of (they add up to `seconds`); `uncertain` names those parts that rest on
    more than measurements (with `extrapolated` or `catalogue`); `assumptions` are sentences for the plan.
    """

    seconds: float
    parts: Mapping[str, float]
    uncertain: Mapping[str, Source] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()

    @property
    def source(self) -> Source:
        """The least certain source that the seconds rest on."""
        found: Source = "measured"
        for source in self.uncertain.values():
            found = worse(found, source)
        return found


class Tally:
    """Parts of a cost, added up."""

    def __init__(self) -> None:
        self._parts: dict[str, Seconds] = {}

    def add(self, part: str, seconds: Seconds) -> None:
        """More seconds of one part."""
        if seconds.value:
            self._parts[part] = self._parts.get(part, Seconds(0.0)) + seconds

    def cost(self, *assumptions: str) -> CallCost:
        """The sum."""
        return CallCost(
            seconds=sum(seconds.value for seconds in self._parts.values()),
            parts={name: seconds.value for name, seconds in self._parts.items()},
            uncertain={
                name: seconds.source for name, seconds in self._parts.items() if seconds.source != "measured"
            },
            assumptions=tuple(text for text in assumptions if text),
        )


def longest(*times: Seconds) -> Seconds:
    """The longest of several times that run side by side."""
    return max(times, key=lambda seconds: seconds.value)
