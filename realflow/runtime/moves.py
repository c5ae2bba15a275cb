"""Reallocations on one worker: its slices of the schedules, bound to the storage of its holdings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from realflow.models.causal import DTYPES
from realflow.planfile.holdings import Holding
from realflow.realloc.buckets import Buckets
from realflow.realloc.execute import Moved, Reallocation
from realflow.realloc.schedule import from_wire
from realflow.realloc.storage import Storage
from realflow.runtime.hosts import Host, Hosts
from realflow.runtime.messages import Slice

SAMPLE = 16
"""Parameters, about, whose checksums are compared each time after the first; which, changes each time."""


@dataclass
class _Edge:
    """An edge as this rank takes part in it. `uses` counts how often it was carried out."""

    work: Reallocation
    share: float
    uses: int = 0


class Moves:
    """Carries out reallocations. What an edge needs (descriptor tables, bindings) is made once."""

    def __init__(self, hosts: Hosts, device: torch.device) -> None:
        self._hosts = hosts
        self._buckets = Buckets(device=device)
        self._edges: dict[str, _Edge] = {}

    def run(self, part: Slice, version: int) -> tuple[Moved, float]:
        """Move weights of `version` along the edge of a slice; all ranks of the edge do it together.

        Checksums at both ends are compared: of every parameter the first time, then of a sample.
        Returns what was moved, and the seconds that the comparison took.
        """
        read, write = self._holdings(part.model, part.read), self._holdings(part.into, part.write)
        for host in (*read, *write):
            host.residence.restore()
        if part.edge not in self._edges:
            self._edges[part.edge] = self._bound(part, read, write)
        edge = self._edges[part.edge]
        average = part.decay > 0
        moved = edge.work.run(record=average)
        started = time.perf_counter()
        edge.work.verify(share=1.0 if edge.uses == 0 else edge.share, seed=version)
        seconds = time.perf_counter() - started
        edge.uses += 1
        for host in (*read, *(write if average else [])):  # else the call that needs them comes next
            host.put_away()
        return moved, seconds

    def _holdings(self, model: str, numbers: Sequence[Sequence[int]]) -> list[Host]:
        return [self._hosts.part(model, Holding(*holding)) for holding in numbers]

    def _bound(self, part: Slice, read: Sequence[Host], write: Sequence[Host]) -> _Edge:
        work = Reallocation(
            from_wire(part.part),
            self._hosts.rank,
            None,
            _bindings(read),
            _bindings(write),
            self._buckets,
            wire=DTYPES[part.wire],
            decay=part.decay or None,
        )
        return _Edge(work, min(1.0, SAMPLE / part.parameters))


def _bindings(hosts: Sequence[Host]) -> dict[str, list[Storage]]:
    """Parameter -> the storage of the boxes that these holdings have."""
    found: dict[str, list[Storage]] = {}
    for host in hosts:
        for name, box in host.model.boxes().items():
            found.setdefault(name, []).append(Storage.of(box, host.model.flat.view(name)))
    return found
