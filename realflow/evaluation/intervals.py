"""How sure a mean over problems is: bootstrap intervals.

Problems are what is drawn anew, each with all its samples (a cluster bootstrap): the samples of a problem
are alike, so that an interval over samples would be too narrow. The difference of two models over the same
problems is the mean of the problems' differences (a paired bootstrap): how hard a problem is cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
RESAMPLES = 4000
_AT_ONCE = 1 << 22
"""Numbers that are drawn at once."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `problems` problems and its interval; None where it cannot be told."""

    value: float | None
    low: float | None
    high: float | None
    problems: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate(
    values: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of a value for each problem, with its interval at `level`.

    The interval is None for fewer than two problems, and where all values are equal: resampling then
    finds one mean only, which says nothing of how far the next problems may be from it.
    """
    if not values:
        return Estimate(None, None, None, 0)
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if len(found) < 2 or float(found.min()) == float(found.max()):
        return Estimate(mean, None, None, len(found))
    tail = _tail(len(found), level)
    low, high = np.quantile(_means(found, resamples, seed), [tail, 1.0 - tail])
    return Estimate(mean, float(low), float(high), len(found))


def _means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` draws of as many values, with replacement."""
    random = np.random.Generator(np.random.PCG64(seed))
    each = max(1, _AT_ONCE // len(values))
    means = []
    for first in range(0, resamples, each):
        count = min(each, resamples - first)
        means.append(values[random.integers(0, len(values), size=(count, len(values)))].mean(axis=1))
    return np.concatenate(means)


def _tail(count: int, level: float) -> float:
    """The share of resampled means to leave out on each side.

    Plain percentiles are too narrow for few problems: a resample's variance is (n-1)/n of what it should be,
    and they know no t distribution. The expanded percentile interval (Hesterberg 2015, "What teachers should
    know about the bootstrap", The American Statistician 69) leaves out Phi(-sqrt(n/(n-1)) t), t the quantile
    of n-1 degrees of freedom.
    """
    wide = math.sqrt(count / (count - 1)) * t_quantile((1.0 + level) / 2.0, count - 1)
    return NormalDist().cdf(-wide)


def t_quantile(share: float, freedom: int) -> float:
    """The quantile of Student's t distribution, 0.5 < share < 1.

    Exact for 1 and 2 degrees of freedom; else Abramowitz and Stegun 26.7.5, an expansion about the normal
    quantile (at 0.975 within 0.2 %).
    """
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2.0 * share - 1.0) * math.sqrt(2.0 / (4.0 * share * (1.0 - share)))
    z, n = NormalDist().inv_cdf(share), freedom
    terms = (
        z,
        (z**3 + z) / (4.0 * n),
        (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / (96.0 * n**2),
        (3.0 * z**7 + 19.0 * z**5 + 17.0 * z**3 - 15.0 * z) / (384.0 * n**3),
        (79.0 * z**9 + 776.0 * z**7 + 1482.0 * z**5 - 1920.0 * z**3 - 945.0 * z) / (92160.0 * n**4),
    )
    return math.fsum(terms)
