"""Reallocations on one worker: its slices of the schedules, bound to the storage of its holdings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from realflow.models.causal import DTYPES
from realflow.planfile.holdings import Holding
from realflow.realloc.buckets import Buckets
from realflow.realloc.exchange import Moved, Reallocation
from realflow.realloc.schedule import Schedule, from_wire
from realflow.realloc.storage import Computed, Storage, find
from realflow.runtime.hosts import Host, Hosts
from realflow.runtime.messages import Slice

SAMPLE = 16
"""Parameters, about, whose checksums are compared each time after the first; which, changes each time."""

Bound = dict[str, list[Storage | Computed]]
"""Parameter -> the storage of the boxes that holdings have of it."""


@dataclass
class _Edge:
    """An edge as this rank takes part in it. `part` is without its schedule, which is bound in `work`;
    `read` are the holdings that this rank sends or copies from. `uses` counts how often it was carried
    out."""

    part: Slice
    work: Reallocation
    read: Sequence[Host]
    write: Sequence[Host]
    uses: int = 0


class Moves:
    """Carries out reallocations. What an edge needs (descriptor tables, bindings) is made once."""

    def __init__(self, hosts: Hosts, device: torch.device) -> None:
        self._hosts = hosts
        self._buckets = Buckets(device=device)
        self._edges: dict[str, _Edge] = {}

    def __contains__(self, edge: str) -> bool:
        return edge in self._edges

    def add(self, part: Slice) -> None:
        """Bind an edge that is not known yet."""
        assert part.edge not in self, part.edge
        self._edges[part.edge] = self._bound(part)

    def run(self, name: str, version: int) -> tuple[Slice, Moved, float]:
        """Move weights of `version` along an edge; all ranks of the edge do it together.

        Checksums at both ends are compared: of every parameter the first time, then of a sample.
        Returns the slice without its schedule, what was moved, and the seconds of the comparison.
        """
        edge = self._edges[name]
        follows = edge.part.into != edge.part.model
        for host in (*edge.read, *edge.write):
            host.restore()
        moved = edge.work.run(record=edge.part.decay > 0)
        started = time.perf_counter()
        share = min(1.0, SAMPLE / edge.part.parameters) if edge.uses else 1.0
        edge.work.verify(share=share, seed=version)
        seconds = time.perf_counter() - started
        edge.uses += 1
        if edge.part.decay > 0:
            for host in edge.write:
                host.spread()
        for host in (*edge.read, *(edge.write if follows else [])):  # else the call that needs them is next
            host.put_away()
        return edge.part, moved, seconds

    def _bound(self, part: Slice) -> _Edge:
        read, write = self._holdings(part.model, part.read), self._holdings(part.into, part.write)
        for host in (*read, *write):
            host.restore()
        schedule = from_wire(part.part)
        sources, owners = _bindings(read)
        work = Reallocation(
            schedule,
            self._hosts.rank,
            None,
            sources,
            _bindings(write)[0],
            self._buckets,
            wire=DTYPES[part.wire],
            decay=part.decay or None,
        )
        used = _used(schedule, sources, owners, self._hosts.rank)
        for index, host in enumerate(read):
            if index not in used:
                host.put_away()
        return _Edge(replace(part, part={}), work, [read[index] for index in sorted(used)], write)

    def _holdings(self, model: str, numbers: Sequence[Sequence[int]]) -> list[Host]:
        return [self._hosts.part(model, Holding(*holding)) for holding in numbers]


def _bindings(hosts: Sequence[Host]) -> tuple[Bound, dict[int, int]]:
    """The storage of what these holdings have, and for each (by its `id`) the index of its holding."""
    found: Bound = {}
    owners: dict[int, int] = {}
    for index, host in enumerate(hosts):
        for name, box in host.model.boxes().items():
            storage = host.bound(name, box)
            found.setdefault(name, []).append(storage)
            owners[id(storage)] = index
    return found, owners


def _used(schedule: Schedule, sources: Bound, owners: dict[int, int], rank: int) -> set[int]:
    """The holdings, by index, that a rank sends or copies from."""
    return {
        owners[id(find(sources, move.name, move.box, rank))]
        for move in (*schedule.transfers, *schedule.copies)
        if move.source == rank and not move.hop
    }
