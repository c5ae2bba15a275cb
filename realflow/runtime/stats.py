"""What a dispatch reports beside its results: when it computed, and numbers over its samples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from realflow.engines.generate import Finished

Stats = dict[str, list[float]]
"""Name -> [sum, count, min, max]."""

METRIC_NAMES = {
    "rewards": "critic/rewards",
    "advantages": "critic/advantages",
    "returns": "critic/returns",
    "values": "critic/values",
}
"""Fields whose metrics have a name that users know (verl's)."""


class Spans:
    """Intervals of computation in seconds since the epoch; those that touch are one."""

    def __init__(self) -> None:
        self.merged: list[list[float]] = []

    def __enter__(self) -> None:
        self._start = time.time()

    def __exit__(self, *_: object) -> None:
        now = time.time()
        if self.merged and self._start - self.merged[-1][1] < 0.002:
            self.merged[-1][1] = now
        else:
            self.merged.append([self._start, now])


def field_stats(
    call: str, values: Mapping[str, Sequence[Any]], masks: Sequence[torch.Tensor] | None = None
) -> Stats:
    """Numbers of the fields that `call` wrote, under the names of metrics.

    `masks` (bool [L] for each sample) says which tokens count in fields of tokens; without it there
    are no numbers of those.
    """
    found = numeric_stats(values, masks)
    return {METRIC_NAMES.get(name, f"{call}/{name}"): numbers for name, numbers in found.items()}


def numeric_stats(values: Mapping[str, Sequence[Any]], masks: Sequence[torch.Tensor] | None = None) -> Stats:
    """Numbers of each numeric field of samples, and with `masks` of tokens; missing values are left
    out."""
    stats: Stats = {}
    for name, column in values.items():
        numbers = [float(v) for v in column if isinstance(v, int | float) and v == v]
        if masks is not None and column and isinstance(column[0], torch.Tensor):
            packed = torch.cat([value[mask] for value, mask in zip(column, masks, strict=True)])
            numbers = packed.tolist() if packed.ndim == 1 else []
        if numbers:
            stats[name] = _sums(numbers)
    return stats


def response_stats(finished: Sequence[Finished], prefix: str = "") -> Stats:
    """Lengths of responses and how many were cut off, under names that start with `prefix`."""
    if not finished:
        return {}
    return {
        f"{prefix}response_length": _sums([float(f.loss_mask.sum()) for f in finished]),
        f"{prefix}response_length/clip_ratio": _sums([float(f.finish_reason == "length") for f in finished]),
    }


def eval_means(
    rewards: Sequence[float | None], sources: Sequence[str | None], solved: float = 1.0
) -> dict[str, list[float]]:
    """Metrics of an evaluation's rewards, as [sum, count]: the mean reward, the share of samples that solve
    their problem (a reward of at least `solved`), both also of each source, and the share without a reward
    (None), which count in no mean."""
    there = [(reward, source) for reward, source in zip(rewards, sources, strict=True) if reward is not None]
    found = {"eval/missing": [float(len(rewards) - len(there)), float(len(rewards))]}
    for source in sorted({None, *(source for _, source in there)}, key=str):
        mine = [reward for reward, own in there if source in (None, own)]
        prefix = "eval/" if source is None else f"eval/{source}/"
        if mine:
            found[f"{prefix}reward/mean"] = [sum(mine), float(len(mine))]
            found[f"{prefix}pass@1"] = [float(sum(reward >= solved for reward in mine)), float(len(mine))]
    return found


def _sums(numbers: Sequence[float]) -> list[float]:
    return [sum(numbers), float(len(numbers)), min(numbers), max(numbers)]
