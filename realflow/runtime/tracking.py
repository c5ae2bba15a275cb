"""How much memory tensors take: the peak of what is alive while something runs.

On CUDA the allocator counts. On a CPU every operation is looked at as it is dispatched: the storages of
what goes in and comes out are known until they are gone. What an operation takes and gives back within
itself is not seen, nor what threads do that no mode was entered on, nor memory that is mapped (the buckets
that ranks of one machine share: whole in the address space, there only where they were written to).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from realflow.runtime.messages import DispatchDone

METRIC = "memory/peak/"
"""What the names of the peaks begin with: `memory/peak/train/rank0`, in bytes."""


class Peak:
    """The most bytes that were alive at once."""

    def __init__(self) -> None:
        self.bytes = 0


class Tracker(TorchDispatchMode):
    """While it is entered, knows the storages on CPUs of all tensors that operations read and make."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._bytes = 0
        self._peaks: list[Peak] = []

    @property
    def live_bytes(self) -> int:
        """Bytes of the storages that are alive now."""
        self._bytes = 0
        for key, (known, _) in list(self._alive.items()):
            storage = known()
            if storage is not None:
                size = storage.nbytes()  # emptied and filled again by whoever owns it
                self._alive[key] = known, size
                self._bytes += size
        return self._bytes

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """The peak of what is alive, also of what was before, while the context is entered."""
        found = Peak()
        self._peaks.append(found)
        self._note()
        try:
            yield found
        finally:
            self._note()
            self._peaks.remove(found)

    def take(self, tensors: Iterable[torch.Tensor]) -> None:
        """Know tensors that no operation has made here."""
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """An operation: run it, then look at what it has read and made."""
        result = func(*args, **(kwargs or {}))
        for value in (args, result, tuple((kwargs or {}).values())):
            self._look(value)
        if self._peaks and self._bytes > min(peak.bytes for peak in self._peaks):
            self._note()
        return result

    def _look(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._add(value)
        elif isinstance(value, tuple | list):
            for item in value:
                self._look(item)

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        if not storage.resizable():  # a view of memory that torch has not taken
            return
        key, size = storage._cdata, storage.nbytes()
        before = self._alive.get(key)
        if before is None or before[0]() is not storage:
            known = weakref.ref(storage, lambda gone: self._gone(key, gone))
            self._alive[key] = known, size
            self._bytes += size - (before[1] if before else 0)
        elif before[1] != size:
            self._alive[key] = before[0], size
            self._bytes += size - before[1]

    def _gone(self, key: int, gone: weakref.ref[torch.UntypedStorage]) -> None:
        known = self._alive.get(key)
        if known is not None and known[0] is gone:
            del self._alive[key]
            self._bytes -= known[1]

    def _note(self) -> None:
        size = self.live_bytes
        for peak in self._peaks:
            peak.bytes = max(peak.bytes, size)


class Watch:
    """Tells the peak of each dispatch of a rank with its report. Enter it on the thread that computes."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._tracker = None if device.type == "cuda" else Tracker()
        self._what = self._dispatch = ""
        self._peak = Peak()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """As long as tensors are made."""
        if self._tracker is None:
            yield
            return
        with self._tracker:
            yield

    @contextmanager
    def during(self, what: str, dispatch: str) -> Iterator[None]:
        """While a dispatch runs; `what` is the call, or what else it does."""
        self._what, self._dispatch = what, dispatch
        if self._tracker is None:
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            return
        with self._tracker.peak() as self._peak:
            yield

    def reported(self, done: DispatchDone) -> DispatchDone:
        """A report with the peak, if it is that of the dispatch that runs."""
        if done.dispatch != self._dispatch:
            return done
        if self._tracker is None:
            size = torch.cuda.max_memory_allocated(self._device)
        else:
            size = self._peak.bytes
        return replace(done, values={**done.values, f"{METRIC}{self._what}/rank{self._rank}": float(size)})
