"""Comparing numbers in tests."""

from __future__ import annotations

import math
from collections.abc import Iterable


def largest(values: Iterable[float]) -> float:
    """The largest of `values`, none negative; infinite where one is NaN, which `max` may pass over."""
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)
