"""Nodes and links of a cluster, and what a schedule puts on them. Pure: no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from realflow.errors import InputError
from realflow.realloc.schedule import Schedule


@dataclass(frozen=True)
class Topology:
    """Which node a rank is on, and the bytes a second that links carry in each direction.

    `inside` is what a rank sends, and what it receives, within its node; `between_rank` the same to and
    from other nodes; `between_node` what all ranks of a node together send to other nodes, and
    receive. None: not known, or no limit of its own.
    """

    nodes: Mapping[int, str]
    inside: float | None = None
    between_rank: float | None = None
    between_node: float | None = None

    def __post_init__(self) -> None:
        for name in ("inside", "between_rank", "between_node"):
            speed = getattr(self, name)
            if speed is not None and not speed > 0:
                raise InputError(f"topology: {name} must be more than 0 bytes a second, not {speed!r}")


@dataclass(frozen=True)
class LinkLoad:
    """Bytes that a link carries in one direction; `seconds` at full speed, None where it is unknown."""

    link: str
    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Loads:
    """What `realflow explain --realloc` says of a schedule.

    `busiest_sender` is (rank, bytes), None where nothing moves. `links` are those that carry
    something, the busiest first. `floor_seconds` is the time that the busiest link needs for its
    bytes at full speed; None where no speed is known.
    """

    bytes: int
    lower_bound_bytes: int
    copied_bytes: int
    relayed_bytes: int
    between_nodes_bytes: int
    busiest_sender: tuple[int, int] | None
    busiest_bound_bytes: int
    links: tuple[LinkLoad, ...]
    floor_seconds: float | None


def loads(schedule: Schedule, topology: Topology | Mapping[int, str] | None = None) -> Loads:
    """Sum up a whole schedule under a topology (None: all ranks on one node, speeds unknown)."""
    sizes = schedule.moves.bytes(schedule.itemsizes)
    rows = schedule.moves.rows
    ranks = sorted({*rows.source.tolist(), *rows.destination.tolist()})
    known = as_topology(topology, ranks)
    carried: dict[tuple[str, str], int] = defaultdict(int)
    between = 0
    for source, destination, size in zip(
        rows.source.tolist(), rows.destination.tolist(), sizes.tolist(), strict=True
    ):
        here, there = known.nodes[source], known.nodes[destination]
        if here == there:
            carried["inside", f"rank {source} sends inside its node"] += size
            carried["inside", f"rank {destination} receives inside its node"] += size
            continue
        between += size
        carried["between_rank", f"rank {source} sends to other nodes"] += size
        carried["between_rank", f"rank {destination} receives from other nodes"] += size
        carried["between_node", f"node {here} sends to other nodes"] += size
        carried["between_node", f"node {there} receives from other nodes"] += size
    links = []
    for (kind, link), size in carried.items():
        speed: float | None = getattr(known, kind)
        links.append(LinkLoad(link, size, None if speed is None else size / speed))
    links.sort(key=lambda load: (-(load.seconds or 0.0), -load.bytes, load.link))
    sent = schedule.sent_bytes
    return Loads(
        bytes=schedule.bytes,
        lower_bound_bytes=schedule.lower_bound_bytes,
        copied_bytes=int(schedule.local.bytes(schedule.itemsizes).sum()),
        relayed_bytes=int(sizes[np.flatnonzero(rows.hop == 1)].sum()),
        between_nodes_bytes=between,
        busiest_sender=min(sent.items(), key=lambda item: (-item[1], item[0])) if sent else None,
        busiest_bound_bytes=schedule.busiest_bound_bytes,
        links=tuple(links),
        floor_seconds=max((load.seconds for load in links if load.seconds is not None), default=None),
    )


def as_topology(topology: Topology | Mapping[int, str] | None, ranks: list[int]) -> Topology:
    """A Topology of what callers may give. Raises InputError for a rank whose node it does not say."""
    if topology is None:
        return Topology(dict.fromkeys(ranks, ""))
    known = topology if isinstance(topology, Topology) else Topology(topology)
    if unknown := [rank for rank in ranks if rank not in known.nodes]:
        raise InputError(f"the topology does not say on which node ranks {unknown} are")
    return known
