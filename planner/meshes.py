"""The runs of devices that a call may take: aligned blocks inside a node, and runs of whole nodes.

A tensor group never leaves a node, and a mesh never mixes kinds: devices of several kinds are pools of
their own, with costs of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from realflow.planfile import Cluster, Node


@dataclass(frozen=True)
class Pool:
    """Neighbouring nodes that are alike: `nodes` times `node`, from device number `first` on."""

    node: Node
    nodes: int
    first: int

    @property
    def devices(self) -> range:
        """The numbers of its devices."""
        return range(self.first, self.first + self.nodes * self.node.devices)


def pools(cluster: Cluster) -> tuple[Pool, ...]:
    """The pools of a cluster, in the order of its devices."""
    found: list[Pool] = []
    first = 0
    for _, alike in groupby(cluster.nodes, key=_what_counts):
        nodes = list(alike)
        found.append(Pool(nodes[0], len(nodes), first))
        first += sum(node.devices for node in nodes)
    return tuple(found)


def places(pool: Pool, *, any_length: bool = True) -> dict[int, tuple[range, ...]]:
    """Number of devices -> every run of so many that a call may take in a pool, rising.

    Inside a node those are blocks at multiples of their size, which is a power of two or divides the
    node's. Beyond, runs of whole nodes: of any length (of more than 32 nodes in steps of a sixteenth, as
    `lengths` has them) and from any node on, or (`any_length` False) of a power of two of nodes at
    multiples of it, and all nodes.
    """
    width, found = pool.node.devices, {}
    for size in range(1, width):
        if width % size == 0 or size.bit_count() == 1:
            starts = range(0, width - size + 1, size)
            found[size] = tuple(
                range(at, at + size)
                for node in range(pool.nodes)
                for start in starts
                for at in [pool.first + node * width + start]
            )
    for nodes in lengths(pool.nodes, any_length=any_length):
        steps = range(0, pool.nodes - nodes + 1, 1 if any_length else nodes)
        found[nodes * width] = tuple(
            range(at, at + nodes * width) for step in steps for at in [pool.first + step * width]
        )
    return found


def lengths(nodes: int, *, any_length: bool) -> tuple[int, ...]:
    """The numbers of nodes that a run may have, of so many: all up to 32, and beyond in steps of a sixteenth
    of the power of two below; or powers of two. In either case all nodes.

    >>> lengths(40, any_length=True)[-6:], lengths(12, any_length=False)
    ((31, 32, 34, 36, 38, 40), (1, 2, 4, 8, 12))
    """
    if any_length:
        steps = (max(1, (1 << count.bit_length() - 1) // 16) for count in range(1, nodes + 1))
        found = [count for count, step in enumerate(steps, start=1) if count % step == 0]
    else:
        found = [1 << bit for bit in range(nodes.bit_length())]
    return tuple(dict.fromkeys([*found, nodes]))


def _what_counts(node: Node) -> tuple[object, ...]:
    """Equal for nodes that are alike."""
    return node.devices, node.kind, node.memory_bytes, node.inside, node.between
