"""Worker processes for what may never end: each item has a limit of time, and one that goes over it costs
itself alone.

    with Pool("realflow.rewards.answers:same", workers=2, seconds=5) as pool:
        results = pool.map([("1/2", "0.5"), ("x", "y")])  # [Value(True), Value(False)]

A worker is a fresh interpreter (never a fork of a process that has threads, a GPU or MPI) that imports
the one function it was started for. Items and results are JSON lines over pipes: nothing is pickled.
Workers start when there is work; one that hangs or dies is ended by its id and another takes its place.
None outlives its pool: it ends when its pipe closes, and within an item by a timer of the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from realflow.errors import RunError

START_SECONDS = 120.0  # importing, on a machine that has other things to do
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Value:
    """What the function returned: a JSON value."""

    value: Any


@dataclass(frozen=True)
class Timeout:
    """The item took longer than `seconds`; its worker was ended."""

    seconds: float


@dataclass(frozen=True)
class Failure:
    """The function raised, or the worker died: what happened, in words."""

    message: str


Result = Value | Timeout | Failure


class Pool:
    """At most `workers` processes, each of which calls `function` ("package.module:name") on one item after
    the other; `seconds` is the limit for one item, `megabytes` that of a worker's memory. A worker calls
    `setup` ("package.module:name"), which takes nothing, once before its first item and outside of its limit.

    `map` may be called from several threads; calls then take turns.
    """

    def __init__(
        self,
        function: str,
        *,
        workers: int = 1,
        seconds: float = 5.0,
        megabytes: int = 4096,
        setup: str = "",
    ) -> None:
        if workers < 1 or seconds <= 0:
            raise ValueError(f"a pool needs a worker and time for it, not {workers} and {seconds} s")
        self.function, self.workers, self.seconds = function, workers, seconds
        self._arguments = [function, str(seconds), str(megabytes), setup]
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._finalizer = weakref.finalize(self, _end_all, self._all)

    def map(self, items: Sequence[Sequence[Any]]) -> list[Result]:
        """`function(*item)` for each item, in the order of items: a Value, Timeout or Failure each.

        Items and what is returned must be JSON values. Raises RunError when a worker cannot start.
        """
        with self._lock:
            if not self._finalizer.alive:
                raise RunError("this pool of workers is closed")
            return _Round(self, items).run()

    def close(self) -> None:
        """End all workers. Without it they end with the pool or with the process."""
        with self._lock:
            self._finalizer()

    def pids(self) -> list[int]:
        """The process ids of the workers that live."""
        return sorted(worker.process.pid for worker in self._all)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            self._drop(worker)
        worker = _Worker(self._arguments)
        self._all.add(worker)
        return worker

    def _drop(self, worker: _Worker) -> None:
        worker.end()
        self._all.discard(worker)


class _Worker:
    """One process and its pipes. `item` is the index it works on, -1 while it starts, None when idle."""

    def __init__(self, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "realflow.rewards.worker", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        self.item: int | None = -1
        self.deadline = time.monotonic() + START_SECONDS
        self._buffer = bytearray()

    def send(self, index: int, item: Sequence[Any], seconds: float) -> bool:
        """Give it an item; False where it is dead."""
        assert self.process.stdin is not None
        self.item, self.deadline = index, time.monotonic() + seconds
        line = memoryview(json.dumps(list(item)).encode() + b"\n")
        try:
            while line:
                line = line[self.process.stdin.write(line) :]
        except BrokenPipeError:
            return False
        return True

    def read(self) -> dict[str, Any] | None:
        """The next line, where all of it is there. Raises EOFError when the worker has ended."""
        assert self.process.stdout is not None
        found = os.read(self.process.stdout.fileno(), _CHUNK)
        if not found:
            raise EOFError
        self._buffer += found
        if not self._buffer.endswith(b"\n"):
            return None
        line, self._buffer = bytes(self._buffer), bytearray()
        return dict(json.loads(line))

    def end(self, after: float = 0.0) -> str:
        """End it by its id unless it has ended by itself `after` seconds from now; says how it ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(after)
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()
        return f"exit code {code}" if code >= 0 else f"signal {-code}"


class _Round:
    """One `map`: items are given out as workers become free."""

    def __init__(self, pool: Pool, items: Sequence[Sequence[Any]]) -> None:
        self.pool, self.items = pool, items
        self.waiting = deque(range(len(items)))
        self.results: list[Result | None] = [None] * len(items)
        self.busy: dict[int, _Worker] = {}  # by the file descriptor of its stdout
        self.selector = selectors.DefaultSelector()

    def run(self) -> list[Result]:
        try:
            while self.waiting or self.busy:
                while len(self.waiting) > self.starting() and len(self.busy) < self.pool.workers:
                    self.begin(self.pool._take())
                self.step()
        finally:
            for worker in self.busy.values():  # only where something was raised
                self.pool._drop(worker)
            self.selector.close()
        assert all(result is not None for result in self.results)
        return [result for result in self.results if result is not None]

    def starting(self) -> int:
        """How many workers will soon take an item."""
        return sum(worker.item == -1 for worker in self.busy.values())

    def begin(self, worker: _Worker) -> None:
        """Watch a worker, and give it an item if it has started."""
        assert worker.process.stdout is not None
        descriptor = worker.process.stdout.fileno()
        self.busy[descriptor] = worker
        self.selector.register(descriptor, selectors.EVENT_READ)
        if worker.item is None:
            self.give(worker)

    def give(self, worker: _Worker) -> None:
        """The next item for a worker, or none: then it is idle."""
        if not self.waiting:
            worker.item = None
            self.leave(worker)
            self.pool._idle.append(worker)
            return
        index = self.waiting.popleft()
        if not worker.send(index, self.items[index], self.pool.seconds):
            self.died(worker)

    def step(self) -> None:
        """Wait for an answer or a deadline, and deal with what came."""
        nearest = min(worker.deadline for worker in self.busy.values())
        ready = self.selector.select(max(0.0, nearest - time.monotonic()))
        for key, _ in ready:
            worker = self.busy[key.fd]
            try:
                line = worker.read()
            except EOFError:
                self.died(worker)
                continue
            if line is not None:
                self.answered(worker, line)
        now = time.monotonic()
        for worker in [worker for worker in self.busy.values() if worker.deadline <= now]:
            if worker.item == -1:
                raise RunError(f"a worker for {self.pool.function} did not start in {START_SECONDS:.0f} s")
            self.settle(worker, Timeout(self.pool.seconds))
            self.leave(worker)
            self.pool._drop(worker)

    def answered(self, worker: _Worker, line: dict[str, Any]) -> None:
        """A worker's line: it is ready, or what became of its item."""
        if worker.item == -1:
            if "error" in line:
                raise RunError(f"a worker for {self.pool.function} cannot start: {line['error']}")
        else:
            self.settle(worker, Failure(line["error"]) if "error" in line else Value(line["value"]))
        self.give(worker)

    def died(self, worker: _Worker) -> None:
        """A worker ended by itself: its item failed; one that ended at its timer was too slow."""
        late = worker.deadline <= time.monotonic()
        self.leave(worker)
        self.pool._all.discard(worker)
        how = worker.end(after=1.0)
        if worker.item == -1:
            raise RunError(f"a worker for {self.pool.function} ended before it was ready ({how})")
        self.settle(worker, Timeout(self.pool.seconds) if late else Failure(f"the worker died ({how})"))

    def settle(self, worker: _Worker, result: Result) -> None:
        assert worker.item is not None
        self.results[worker.item] = result

    def leave(self, worker: _Worker) -> None:
        """Watch a worker no longer."""
        assert worker.process.stdout is not None
        descriptor = worker.process.stdout.fileno()
        self.selector.unregister(descriptor)
        del self.busy[descriptor]


def _end_all(workers: set[_Worker]) -> None:
    while workers:
        workers.pop().end()
