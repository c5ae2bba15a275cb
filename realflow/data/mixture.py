"""Several sources in one sequence of prompts, each with its weight.

Which source prompt g comes from, and which of that source's prompts it is, is computed from g alone: a run
that resumes needs nothing but its cursor, and every source still gives each of its rows once in each of its
own epochs. The sources take turns as evenly as their weights allow (Beatty sequences): of the first N
prompts, the k-th source of the list has given its share of N, to within k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from realflow.data.shuffle import mix

_PHASES = 1 << 32


@dataclass(frozen=True)
class _Split:
    """Of `n` prompts that are left for it and those behind it, a source takes
    `floor(share n + phase)`: `share` is its weight over that of all of these, and `phase` in [0, 1)."""

    share: Fraction
    phase: Fraction

    def taken(self, n: int) -> int:
        return int(self.share * n + self.phase)  # at most n, as share is at most 1 and phase below it


class Turns:
    """Whose turn it is. Sources are numbered as in `weights`, which are above 0; `seed` moves the turns."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        assert weights and all(0 < weight < float("inf") for weight in weights), weights
        exact = [Fraction(weight) for weight in weights]
        self._splits = [
            _Split(weight / sum(exact[place:]), Fraction(mix(seed + place) % _PHASES, _PHASES))
            for place, weight in enumerate(exact)
        ]

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` prompts come from each source."""
        found, left = [], n
        for split in self._splits[:-1]:
            found.append(split.taken(left))
            left -= found[-1]
        return [*found, left]

    def at(self, g: int) -> tuple[int, int]:
        """The source of prompt g, and how many prompts that source gave before."""
        place = g
        for source, split in enumerate(self._splits[:-1]):
            before = split.taken(place)
            if split.taken(place + 1) > before:
                return source, before
            place -= before
        return len(self._splits) - 1, place
