"""Nodes and links of a cluster, and what a schedule puts on them. Pure: no torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from realflow.errors import InputError
from realflow.realloc.schedule import Schedule

Speed = float | Mapping[str, float] | None
"""Bytes a second: of every node, or node -> its own; None, or a node left out: not known, or no limit."""
Kind = Literal["inside", "between_rank", "between_node"]


@dataclass(frozen=True)
class Topology:
    """Which node a rank is on, and the bytes a second that links carry in each direction.

    `inside` is what a rank sends, and what it receives, within its node; `between_rank` the same to and
    from other nodes; `between_node` what all ranks of a node together send to other nodes, and
    receive. Each is one number for all nodes, or one for each node.
    """

    nodes: Mapping[int, str]
    inside: Speed = None
    between_rank: Speed = None
    between_node: Speed = None

    def __post_init__(self) -> None:
        for name in get_args(Kind):
            speeds = getattr(self, name)
            for speed in speeds.values() if isinstance(speeds, Mapping) else (speeds,):
                if speed is not None and not speed > 0:
                    raise InputError(f"topology: {name} must be more than 0 bytes a second, not {speed!r}")

    def speed(self, kind: Kind, node: str) -> float | None:
        """Bytes a second of the links of one node (`inside`, `between_rank` or `between_node`)."""
        speeds: Speed = getattr(self, kind)
        return speeds.get(node) if isinstance(speeds, Mapping) else speeds


@dataclass(frozen=True)
class LinkLoad:
    """Bytes that a link carries in one direction; `seconds` at full speed, None where it is unknown."""

    link: str
    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Loads:
    """What `realflow explain --realloc` says of a schedule.

    `copied_bytes` are copied from one storage of a rank into another. `busiest_sender` is (rank, bytes),
    None where nothing moves; `busiest_bound_bytes` is rounded up to whole elements. `links` are those
    that carry something, the busiest first. `floor_seconds` is the time that the busiest link needs for
    its bytes at full speed; None where no speed is known.
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
    carried: dict[tuple[Kind, str, str], int] = defaultdict(int)
    between = 0
    for source, destination, size in zip(
        rows.source.tolist(), rows.destination.tolist(), sizes.tolist(), strict=True
    ):
        here, there = known.nodes[source], known.nodes[destination]
        if here == there:
            carried["inside", here, f"rank {source} sends inside its node"] += size
            carried["inside", here, f"rank {destination} receives inside its node"] += size
            continue
        between += size
        carried["between_rank", here, f"rank {source} sends to other nodes"] += size
        carried["between_rank", there, f"rank {destination} receives from other nodes"] += size
        carried["between_node", here, f"node {here} sends to other nodes"] += size
        carried["between_node", there, f"node {there} receives from other nodes"] += size
    links = []
    for (kind, node, link), size in carried.items():
        speed = known.speed(kind, node)
        links.append(LinkLoad(link, size, None if speed is None else size / speed))
    links.sort(key=lambda load: (-(load.seconds or 0.0), -load.bytes, load.link))
    sent = schedule.sent_bytes
    whole = math.gcd(*schedule.itemsizes.values()) or 1  # nobody sends a part of an element
    return Loads(
        bytes=schedule.bytes,
        lower_bound_bytes=schedule.lower_bound_bytes,
        copied_bytes=int(schedule.local.bytes(schedule.itemsizes).sum()),
        relayed_bytes=int(sizes[np.flatnonzero(rows.hop == 1)].sum()),
        between_nodes_bytes=between,
        busiest_sender=min(sent.items(), key=lambda item: (-item[1], item[0])) if sent else None,
        busiest_bound_bytes=-(-schedule.busiest_bound_bytes // whole) * whole,
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
