"""Timing the same work on some ranks at once, within a budget, and keeping the medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from realflow.layout import DeviceMesh, Layout
from realflow.models.place import Axis, Place
from realflow.profiling.request import Setting

Timed = Callable[[], Mapping[str, float]]
"""Does the work once; name of a part -> its seconds. A name becomes the table's `doing`."""
MOST_REPEATS = 15
LEAST_REPEATS = 3
SHORTEST = 0.15
"""Seconds that a point may take in any case."""


@dataclass(frozen=True)
class Job:
    """One point to be measured: `make` prepares it (untimed, on each rank that takes part).

    `alike`: ranks do not work together, so their medians are averaged."""

    what: str
    key: Mapping[str, str | int]
    axes: tuple[str, ...]
    at: tuple[float, ...]
    setting: Setting
    make: Callable[[], Timed]


@dataclass(frozen=True)
class Row:
    """A measured point, with the median and half the distance between the quartiles over it."""

    what: str
    key: Mapping[str, str | int]
    axes: tuple[str, ...]
    at: tuple[float, ...]
    seconds: float
    noise: float


@dataclass
class Bench:
    """This rank among `ranks`, and what has been measured so far (the same rows on all that took part)."""

    rank: int
    ranks: int
    device: torch.device
    deadline: float
    rows: list[Row] = field(default_factory=list)
    skipped: int = 0
    _groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)

    def make_groups(self, sizes: Sequence[int]) -> None:
        """Groups of the first ranks. All ranks call it together."""
        for size in sizes:
            if size > 1:
                self._groups[tuple(range(size))] = dist.new_group(list(range(size)))

    def place(self, setting: Setting, data: int = 1) -> Place:
        """Where this rank stands: in a tensor group of `setting.t`, among `data` replicas, or alone."""
        size = setting.t * data
        if size == 1:
            return Place.alone(self.rank)
        return Place.of(
            DeviceMesh(tuple(range(size)), Layout(dp=data, tp=setting.t)), self.rank, self._groups
        )

    def axis(self, size: int) -> Axis:
        """The first `size` ranks."""
        ranks = tuple(range(size))
        return Axis(ranks, self.rank, self._groups.get(ranks))

    def run(self, jobs: Sequence[Job]) -> None:
        """Measure them in this order. When time is short each is repeated less, and at the end of it only
        the warm-up counts."""
        for index, job in enumerate(jobs):
            if self.rank < job.setting.busy:
                if self.device.type == "cpu":
                    torch.set_num_threads(job.setting.threads)
                self._measure(job, len(jobs) - index)
            dist.barrier()

    def known(self, what: str, at: tuple[float, ...], **key: str | int) -> float | None:
        """The seconds of a point that has been measured."""
        for row in self.rows:
            if (row.what, row.at) == (what, at) and key.items() <= row.key.items():
                return row.seconds
        return None

    def _measure(self, job: Job, left: int) -> None:
        axis = self.axis(job.setting.busy)
        work = job.make()
        self._together(axis)
        started = time.perf_counter()
        first = work()
        once = max(1e-6, time.perf_counter() - started)
        allowed = max(SHORTEST, (self.deadline - time.perf_counter()) / left)
        wish = int(min(MOST_REPEATS, max(LEAST_REPEATS, allowed / once)))
        if once * LEAST_REPEATS > 4 * allowed:
            wish = 1
        repeats = int(self._agreed(axis, wish))
        samples: dict[str, list[float]] = {name: [] for name in first}
        for _ in range(repeats):
            self._together(axis)
            for name, seconds in work().items():
                samples[name].append(seconds)
        for name, values in samples.items():
            median, noise = self._joined(axis, values)
            key = {**job.key, **job.setting.key, **({"doing": name} if name else {})}
            self.rows.append(Row(job.what, key, job.axes, job.at, median, noise))

    def _together(self, axis: Axis) -> None:
        if axis.size > 1:
            dist.barrier(group=axis.group)

    def _agreed(self, axis: Axis, value: int) -> int:
        """The first rank's value."""
        if axis.size == 1:
            return value
        told = torch.tensor([value])
        dist.broadcast(told, src=0, group=axis.group)
        return int(told)

    def _joined(self, axis: Axis, values: Sequence[float]) -> tuple[float, float]:
        """Mean over ranks of the median, and of the noise."""
        found = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
        low, median, high = found
        mine = torch.tensor([median, (high - low) / 2 / max(median, 1e-12)], dtype=torch.float64)
        if axis.size > 1:
            dist.all_reduce(mine, group=axis.group)
        mean = mine / axis.size
        return float(mean[0]), float(mean[1])


def clock(device: torch.device) -> float:
    """Now, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
