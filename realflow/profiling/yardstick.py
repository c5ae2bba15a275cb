"""Fixed pieces of work, by which measurements of different moments can be held against one another.

A machine that others share is faster at one moment than at the next, by a fifth and more, for seconds or
minutes; many small operators, between which threads wait for each other, suffer otherwise than large ones.
`python -m realflow.profiling.yardstick SECONDS` prints how long both take now, on all of its cores.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

_TOKENS, _HIDDEN, _INNER, _HEADS, _LENGTH, _FEW = 1024, 256, 768, 8, 128, 24
WINDOW = 3.0
"""Seconds around a moment whose yardsticks count for it."""
LEAST = 8
"""Yardsticks that a moment's pace is the mean of, where there are so many."""


PIECES = ("large", "small")
"""Passes over many tokens, which take about 5 ms of a core and memory that does not fit in its own caches;
and decoding, in operators of some microseconds."""


class Yardstick:
    """About what a small decoder layer computes, for many tokens and, again and again, for few."""

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
        self._few, self._few_inner = made(_FEW, _HIDDEN), made(_FEW, _INNER)
        self._few_result = torch.empty_like(self._few)

    @torch.no_grad()
    def seconds(self) -> dict[str, float]:
        """How long each of `PIECES` takes now."""
        found = {}
        for name, work in zip(PIECES, (self._large, self._small), strict=True):
            began = _clock(self._device)
            work()
            found[name] = _clock(self._device) - began
        return found

    def _large(self) -> None:
        for _ in range(2):
            torch.mm(self._states, self._up, out=self._inner)
            torch.mul(self._inner, self._wide, out=self._inner)
            torch.mm(self._inner, self._down, out=self._result)
            torch.bmm(self._vectors, self._vectors.transpose(1, 2), out=self._products)
            self._scores.copy_(self._products)
            torch.softmax(self._scores, -1, out=self._shares)

    def _small(self) -> None:
        for _ in range(20):
            torch.mm(self._few, self._up, out=self._few_inner)
            torch.nn.functional.silu(self._few_inner, inplace=True)
            torch.mm(self._few_inner, self._down, out=self._few_result)
            torch.nn.functional.rms_norm(self._few_result, (_HIDDEN,))
            self._few_result.float()


@dataclass
class Pace:
    """How long a fixed piece of work took, from moment to moment."""

    moments: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, moment: float, seconds: float) -> None:
        """It was measured; moments rise."""
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
    """Print the mean seconds of both pieces over this time, as JSON."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yardstick, found = Yardstick(torch.device("cpu")), list[dict[str, float]]()
    yardstick.seconds()
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        found.append(yardstick.seconds())
    print(json.dumps({name: capped_mean([one[name] for one in found]) for name in PIECES}))


if __name__ == "__main__":
    main(float(sys.argv[1]))
