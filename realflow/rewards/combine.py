"""`rewards.weighted`: several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from realflow.errors import InputError

_PLACES = ("first", "second", "third", "fourth", "fifth", "sixth")


def weighted(
    first: torch.Tensor,
    second: torch.Tensor | None = None,
    third: torch.Tensor | None = None,
    fourth: torch.Tensor | None = None,
    fifth: torch.Tensor | None = None,
    sixth: torch.Tensor | None = None,
    *,
    weights: Any = None,
    names: Any = None,
    missing: Literal["sample", "part"] = "sample",
) -> dict[str, Any]:
    """The weighted sum of up to six rewards of each sample.

    Parts are float `[S]` with NaN where one is missing; `weights` has a number for each part that is given
    (none: all 1), `names` what they are called in metrics (none: first, second, ...). Where a part is
    missing, so is the reward (`missing: sample`); with `missing: part` that part is left out, and the others'
    weights grow so that their absolute values have the same sum. A sample without any part has no reward.

    Returns `rewards` and, as `metrics`, for each part its mean over the samples that have it
    (`reward/<name>`), and the share that has not (`reward/<name>/missing`). Raises InputError for weights or
    names that are not one for each part.
    """
    places = zip(_PLACES, (first, second, third, fourth, fifth, sixth), strict=True)
    given = {place: part for place, part in places if part is not None}
    parts = [part.tolist() for part in given.values()]
    scale = _numbers(weights, len(parts))
    called = _called(names, list(given))
    rewards = [_sum(values, scale, missing == "part") for values in zip(*parts, strict=True)]
    return {"rewards": rewards, "metrics": _metrics(called, parts)}


def _sum(values: Sequence[float], weights: Sequence[float], leave_out: bool) -> float | None:
    there = [(value, weight) for value, weight in zip(values, weights, strict=True) if not math.isnan(value)]
    if len(there) == len(values):
        return math.fsum(value * weight for value, weight in there)
    left = math.fsum(abs(weight) for _, weight in there)
    if not leave_out or left == 0:
        return None
    grown = math.fsum(map(abs, weights)) / left
    return grown * math.fsum(value * weight for value, weight in there)


def _metrics(names: Sequence[str], parts: Sequence[Sequence[float]]) -> dict[str, float]:
    metrics = {}
    for name, values in zip(names, parts, strict=True):
        there = [value for value in values if not math.isnan(value)]
        metrics[f"reward/{name}/missing"] = 1 - len(there) / max(1, len(values))
        if there:
            metrics[f"reward/{name}"] = math.fsum(there) / len(there)
    return metrics


def _numbers(weights: Any, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    good = isinstance(weights, list | tuple) and len(weights) == count
    if not good or not all(_is_number(weight) for weight in weights):
        raise InputError(f"rewards.weighted: weights is {weights!r}; expected a list of {count} numbers")
    return [float(weight) for weight in weights]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _called(names: Any, places: list[str]) -> list[str]:
    if names is None:
        return places
    good = isinstance(names, list | tuple) and len(names) == len(places) == len(set(map(str, names)))
    if not good or not all(isinstance(name, str) and name for name in names):
        raise InputError(
            f"rewards.weighted: names is {names!r}; expected a list of {len(places)} different names"
        )
    return list(names)
