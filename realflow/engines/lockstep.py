"""How the ranks of a replica take the same arrivals before the same step.

Messages reach each rank over its own socket, in one order but at different times. Before a step the
replica's first rank says how many are taken; the others take as many of theirs, waiting where one is
still on its way. Whatever is to happen between the same two steps on all ranks (prompts, the end of a
stream, new weights) comes as such a message.
"""

from __future__ import annotations

from collections import deque
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from realflow.models.place import Axis

T = TypeVar("T")

_UNDER_WAY = 64
"""Steps that the first rank may be ahead of what it knows to be received."""


class Arrivals(Generic[T]):
    """The messages of a stream, as all ranks of a replica take them. No message is sent among one rank."""

    def __init__(self, queue: SimpleQueue[T], replica: Axis, device: torch.device) -> None:
        self._queue, self._replica, self._device = queue, replica, device
        self._under_way: deque[list[tuple[dist.Work, torch.Tensor]]] = deque()

    def take(self, *, wait: bool) -> list[T]:
        """The messages taken before the next step, at least one with `wait`.

        All ranks call it together; what `wait` is counts on the first one alone.
        """
        if self._replica.index > 0:
            return [self._queue.get() for _ in range(self._told())]
        taken = [self._queue.get()] if wait else []
        while not self._queue.empty():
            taken.append(self._queue.get())
        if self._replica.size > 1:
            self._tell(len(taken))
        return taken

    def _tell(self, count: int) -> None:
        """Without waiting: in a pipeline the others are some steps behind."""
        number = torch.tensor([count], device=self._device)
        works = []
        for other in range(1, self._replica.size):
            work = dist.isend(number, group=self._replica.group, group_dst=other)
            assert work is not None
            works.append((work, number))
        self._under_way.append(works)
        if len(self._under_way) > _UNDER_WAY:
            self._received(self._under_way.popleft())

    def _told(self) -> int:
        number = torch.zeros(1, dtype=torch.int64, device=self._device)
        dist.recv(number, group=self._replica.group, group_src=0)
        return int(number)

    def close(self) -> None:
        """Wait until the others have received everything."""
        while self._under_way:
            self._received(self._under_way.popleft())

    @staticmethod
    def _received(works: list[tuple[dist.Work, torch.Tensor]]) -> None:
        for work, _ in works:
            work.wait()
