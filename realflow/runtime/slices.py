"""Schedules of edges, made once in a thread of the master, and cut into a slice for each rank."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from realflow.errors import RunError
from realflow.models.card import Card
from realflow.planfile import Plan
from realflow.planfile.holdings import Edge
from realflow.realloc.edges import edge_schedule, topology, wire_dtype
from realflow.realloc.schedule import to_wire
from realflow.realloc.topology import loads
from realflow.runtime.messages import Slice


class Slices:
    """Edges whose schedules are wanted, and those that are ready.

    `prepare` starts one, in a thread; when it is ready `fd` becomes readable, and `take` returns the
    slices. An edge is made once, whoever asks for it again. All but the making is for one thread.
    """

    def __init__(self, plan: Plan, cards: Mapping[str, Card]) -> None:
        self._plan, self._cards = plan, cards
        self._pending: dict[str, Future[dict[int, Slice]]] = {}
        self._known: set[str] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="schedules")
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def prepare(self, edges: Iterable[Edge]) -> None:
        """Make the schedules of these edges, unless it was done or is under way."""
        for edge in edges:
            if edge.key not in self._known:
                self._known.add(edge.key)
                future = self._thread.submit(edge_slices, self._plan, edge, self._cards)
                self._pending[edge.key] = future
                future.add_done_callback(lambda _: os.eventfd_write(self.fd, 1))

    def take(self) -> dict[int, list[Slice]]:
        """Rank -> slices that are ready and were not taken before.

        Raises RunError (from what it was) where a schedule could not be made.
        """
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return {}
        taken: dict[int, list[Slice]] = {}
        for key in [key for key, future in self._pending.items() if future.done()]:
            future = self._pending.pop(key)
            error = future.exception()
            if error is not None:
                raise RunError(
                    f"the schedule of the reallocation {key} could not be made: {error}"
                ) from error
            for rank, part in future.result().items():
                taken.setdefault(rank, []).append(part)
        return taken

    def close(self) -> None:
        """Let go; what is being made is waited for (seconds, and only where a run is cut short)."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        os.close(self.fd)


def edge_slices(plan: Plan, edge: Edge, cards: Mapping[str, Card]) -> dict[int, Slice]:
    """What each rank of an edge must know of it."""
    schedule = edge_schedule(plan, edge, cards)
    floor = loads(schedule, topology(plan.cluster)).floor_seconds or 0.0
    found = {}
    for rank in edge.ranks:
        read, write = (
            [list(holding.numbers) for holder, holding in side if holder == rank]
            for side in (edge.sources, edge.destinations)
        )
        found[rank] = Slice(
            edge.key,
            edge.model,
            edge.into,
            read,
            write,
            to_wire(schedule.part(rank)),
            parameters=len(schedule.itemsizes),
            floor_seconds=floor,
            wire=wire_dtype(plan.graph, edge),
            decay=edge.decay,
        )
    return found
