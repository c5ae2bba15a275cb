"""Timing the same work on some ranks at once, within a budget, and keeping the means."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from realflow.layout import DeviceMesh, Layout
from realflow.models.place import Axis, Place
from realflow.profiling.request import ONCE, Setting
from realflow.profiling.yardstick import PIECES, Pace, Yardstick, capped_mean

Timed = Callable[[], Mapping[str, float]]
"""Does the work once; name of a part -> its seconds. A name becomes the table's `doing`."""
LEAST_REPEATS = 3
SHORTEST = 0.15
"""Seconds that a point may take in any case."""
PACE_SECONDS, PACE_WARM, PACE_REPEATS = 0.4, 3, 4
"""The machine's pace is measured when so many seconds have passed, with so many yardsticks after some that
do not count: the caches are then full of what belongs to them, as where nothing but it is measured."""
SMALL = ("decode", "engine", "engine_middle")
"""What is many small operators."""
TOO_LONG = 8
"""How many times its share of the time a point may take once."""


@dataclass(frozen=True)
class Job:
    """One point to be measured: `make` prepares it (untimed, on each rank that takes part)."""

    what: str
    key: Mapping[str, str | int]
    axes: tuple[str, ...]
    at: tuple[float, ...]
    setting: Setting
    make: Callable[[], Timed]


@dataclass(frozen=True)
class Row:
    """A measured point: the mean of its repeats (`capped_mean`), and half the distance between their
    quartiles over the median; `moment` is when they were half done."""

    what: str
    key: Mapping[str, str | int]
    axes: tuple[str, ...]
    at: tuple[float, ...]
    seconds: float
    noise: float
    moment: float = 0.0


@dataclass
class Bench:
    """This rank among `ranks`, and what has been measured so far (the same rows on all that took part)."""

    rank: int
    ranks: int
    device: torch.device
    deadline: float
    most: int = 15
    """Repeats of a point."""
    rows: list[Row] = field(default_factory=list)
    skipped: int = 0
    paces: Mapping[str, Pace] = field(default_factory=lambda: {name: Pace() for name in PIECES})
    """Of the machine, by the pieces of the yardstick; on the first rank alone."""
    cores: int = 1
    """Threads of the yardstick."""
    _yardstick: Yardstick | None = None
    _once: dict[tuple[str, Setting], tuple[float, float]] = field(default_factory=dict)
    """What the last job of a kind took once, with all that is not timed, and its first place."""
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
        """Measure them in this order. When time is short each is repeated less, points that would take
        much more than their share are left out, and at the end only the warm-up counts."""
        for index, job in enumerate(jobs):
            self._measure_pace()
            if self.rank < job.setting.busy:
                if self.device.type == "cpu":
                    torch.set_num_threads(job.setting.threads)
                self._measure(job, len(jobs) - index)
            dist.barrier()
        self._measure_pace()

    def at_pace(self) -> list[Row]:
        """The rows, as if the machine had been as fast all the time as it was in the mean."""
        found = []
        for row in self.rows:
            pace = self.paces["small" if row.what in SMALL else "large"]
            found.append(replace(row, seconds=row.seconds / pace.factor(row.moment)))
        return found

    def _measure_pace(self) -> None:
        """Measure the yardstick, if it is time; the other ranks wait."""
        now = time.perf_counter()
        moments = self.paces["large"].moments
        if self.rank or (moments and now - moments[-1] < PACE_SECONDS):
            return
        threads = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(self.cores)
        if self._yardstick is None:
            self._yardstick = Yardstick(self.device)
        for _ in range(PACE_WARM):
            self._yardstick.seconds()
        for _ in range(PACE_REPEATS):
            for name, seconds in self._yardstick.seconds().items():
                self.paces[name].add(time.perf_counter(), seconds)
        torch.set_num_threads(threads)

    def known(self, what: str, at: tuple[float, ...], **key: str | int) -> float | None:
        """The seconds of a point that has been measured."""
        for row in self.rows:
            if (row.what, row.at) == (what, at) and key.items() <= row.key.items():
                return row.seconds
        return None

    def _measure(self, job: Job, left: int) -> None:
        axis = self.axis(job.setting.busy)
        allowed = max(SHORTEST, (self.deadline - time.perf_counter()) / left)
        if not self._agreed(axis, self._is_worth(job, allowed)):
            self.skipped += 1
            return
        work = job.make()
        self._together(axis)
        started = time.perf_counter()
        samples = {name: [seconds] for name, seconds in work().items()}
        once = time.perf_counter() - started
        self._once[job.what, job.setting] = once, job.at[0]
        wish = repeats_of(once, allowed, self.deadline - time.perf_counter(), self.most)
        repeats = self._agreed(axis, wish)
        if repeats:
            samples = {name: [] for name in samples}  # the first was the warm-up
        for _ in range(repeats):
            self._together(axis)
            for name, seconds in work().items():
                samples[name].append(seconds)
        moment = (started + time.perf_counter()) / 2
        for name, values in samples.items():
            seconds, noise = self._joined(axis, values)
            key = {**job.key, **job.setting.key, **({"doing": name} if name else {})}
            self.rows.append(Row(job.what, key, job.axes, job.at, seconds, noise, moment))

    def _is_worth(self, job: Job, allowed: float) -> int:
        """Whether there is time for a job (1) or not (0): the first of its kind is always measured, a further
        one unless it would take much more than its share."""
        last = self._once.get((job.what, job.setting))
        if last is None:
            return 1
        once, at = last
        return int(once * max(1.0, job.at[0] / max(at, 1.0)) <= TOO_LONG * allowed)

    def _together(self, axis: Axis) -> None:
        if axis.size > 1:
            dist.barrier(group=axis.group)

    def _agreed(self, axis: Axis, value: int) -> int:
        """The first rank's value."""
        if axis.size == 1:
            return value
        told = torch.tensor([value], device=self.device)
        dist.broadcast(told, src=0, group=axis.group)
        return int(told)

    def _joined(self, axis: Axis, values: Sequence[float]) -> tuple[float, float]:
        """Mean over ranks of the seconds, and of the noise."""
        found = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
        low, median, high = found
        noise = (high - low) / 2 / max(median, 1e-12) if len(values) > 1 else ONCE
        mine = torch.tensor([capped_mean(values), noise], dtype=torch.float64, device=self.device)
        if axis.size > 1:
            dist.all_reduce(mine, group=axis.group)
        mean = mine / axis.size
        return float(mean[0]), float(mean[1])


def repeats_of(once: float, allowed: float, left: float, most: int) -> int:
    """How often work is repeated that takes `once`, where `allowed` is its share of the time and `left` what
    is left altogether: at most `most` times. 0: the warm-up has to do."""
    if left <= 0:
        return 0
    if once * LEAST_REPEATS > 4 * allowed:
        return 1
    return int(min(most, max(LEAST_REPEATS, allowed / max(once, 1e-6))))


def clock(device: torch.device) -> float:
    """Now, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
