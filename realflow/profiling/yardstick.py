"""A fixed piece of work, by which measurements of different moments can be held against one another.

A machine that others share is faster at one moment than at the next, by a fifth and for seconds or minutes.
`python -m realflow.profiling.yardstick SECONDS` prints how long the work takes now, on all of its cores.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

_TOKENS, _HIDDEN, _INNER, _HEADS, _LENGTH = 1024, 256, 768, 8, 128
WINDOW = 3.0
"""Seconds around a moment whose yardsticks count for it."""
LEAST = 8
"""Yardsticks that a moment's pace is the mean of, where there are so many."""


class Yardstick:
    """About what a small decoder layer computes without keeping anything: products, scores, an activation.

    Takes about 5 ms on a core, and as much memory as does not fit in its own caches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        generator = torch.Generator().manual_seed(0)

        def made(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

        count = _TOKENS // _LENGTH * _HEADS
        self._states, self._wide = made(_TOKENS, _HIDDEN), made(_TOKENS, _INNER)
        self._up, self._down = made(_HIDDEN, _INNER), made(_INNER, _HIDDEN)
        self._vectors = made(count, _LENGTH, _HIDDEN // _HEADS)
        self._scores = torch.zeros(count, _LENGTH, _LENGTH, device=device)
        self._shares = torch.zeros_like(self._scores)
        self._products = torch.zeros_like(self._scores, dtype=torch.bfloat16)
        self._inner, self._result = torch.empty_like(self._wide), torch.empty_like(self._states)

    def seconds(self) -> float:
        """How long it takes now."""
        began = _clock(self._device)
        with torch.no_grad():
            for _ in range(2):
                torch.mm(self._states, self._up, out=self._inner)
                torch.mul(self._inner, self._wide, out=self._inner)
                torch.mm(self._inner, self._down, out=self._result)
                torch.bmm(self._vectors, self._vectors.transpose(1, 2), out=self._products)
                self._scores.copy_(self._products)
                torch.softmax(self._scores, -1, out=self._shares)
        return _clock(self._device) - began


@dataclass
class Pace:
    """How long a yardstick took, from moment to moment."""

    moments: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, moment: float, seconds: float) -> None:
        """A yardstick that was measured; moments rise."""
        self.moments.append(moment)
        self.seconds.append(seconds)

    @property
    def mean(self) -> float:
        """Of all."""
        return capped_mean(self.seconds)

    def factor(self, moment: float) -> float:
        """By how much the machine was slower around a moment than in the mean."""
        low = bisect_left(self.moments, moment - WINDOW)
        high = bisect_right(self.moments, moment + WINDOW)
        while high - low < min(LEAST, len(self.moments)):
            low, high = max(0, low - 1), min(len(self.moments), high + 1)
        return capped_mean(self.seconds[low:high]) / self.mean


def capped_mean(values: Sequence[float]) -> float:
    """The mean, where nothing counts for more than twice the median: work that is a sum of many such pieces
    takes as often as long, and once in a while something else runs in between."""
    most = 2 * statistics.median(values)
    return statistics.fmean(min(value, most) for value in values)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(seconds: float) -> None:
    """Print the mean seconds of the yardstick over this time."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yardstick, found = Yardstick(torch.device("cpu")), list[float]()
    yardstick.seconds()
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        found.append(yardstick.seconds())
    print(capped_mean(found))


if __name__ == "__main__":
    main(float(sys.argv[1]))
