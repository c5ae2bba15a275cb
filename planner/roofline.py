"""Seconds of work and messages from data sheets alone: a roofline, and alpha-beta for messages.

work      kernels x launch + the longer of its products and its reads and writes, each at the part of the
          peak that large ones reach, and as if each kernel had `ramp` more of them: that many reach half
messages  rings inside a node; between nodes every device of a group sends by its own adapter, so that the
          ring is as fast as all of them together; latencies of a tree over nodes
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from planner.formulas import Cut, Traffic, Work
from planner.hardware import Device

KERNELS = {"infer": 14, "prefill": 14, "forward": 14, "backward": 28, "recompute": 42, "decode": 12}
"""Kernels of a layer."""
END_KERNELS = 6
UPDATE_BYTES = 44
"""Of an optimizer step for each master: read and written weight and moments (24), gradient read for the norm
and the step (8) and clipped (8), compute weight written and read (4)."""


def work_seconds(device: Device, work: Work, dtype: str, kernels: float) -> float:
    """Seconds of work in so many kernels."""
    products = work.flops + kernels * device.ramp_flops if work.flops else 0.0
    moved = work.bytes + kernels * device.ramp_bytes
    return kernels * device.launch + max(
        products / (device.flops[dtype] * device.achieved_flops),
        moved / (device.bandwidth * device.achieved_bandwidth),
    )


def bytes_seconds(device: Device, size: float) -> float:
    """Seconds of one kernel that reads and writes so many bytes."""
    return work_seconds(device, Work(read=size), next(iter(device.flops)), 1)


def collective_seconds(device: Device, what: str, size: float, ranks: int, per_node: int | None) -> float:
    """Seconds of a collective; see `Rates.collective`."""
    if ranks <= 1 or not size:
        return 0.0
    near = min(ranks, per_node or ranks)
    nodes = -(-ranks // near)
    if what == "all_to_all":
        inside = size * (near - 1) / ranks / device.inside.bytes_per_second
        between = size * (ranks - near) / ranks / device.between.bytes_per_second
        return _latency(device, near, nodes) + max(inside, between)
    rounds = 2 if what == "all_reduce" else 1
    speed = device.inside.bytes_per_second if near > 1 else math.inf
    if nodes > 1:
        speed = min(speed, near * device.between.bytes_per_second)
    return rounds * (_latency(device, near, nodes) + size * (ranks - 1) / ranks / speed)


def traffic_seconds(device: Device, traffic: Iterable[Traffic], cut: Cut, per_node: int | None) -> float:
    """Seconds of the messages of a pass. Tensor ranks are neighbours, context ranks come after them, and
    expert ranks after those."""
    total = 0.0
    strides = {"t": 1, "c": cut.t, "e": cut.t * cut.c, "d": cut.t * cut.c, "dc": cut.t}
    for one in traffic:
        near = None
        if per_node is not None:
            near = max(1, min(one.ranks, per_node // strides.get(one.axis, 1)))
        if one.operation == "p2p":
            within = near is None or near >= min(2, one.ranks)
            total += one.count * message_seconds(device, one.bytes, between=not within)
        else:
            total += one.count * collective_seconds(device, one.operation, one.bytes, one.ranks, near)
    return total


def message_seconds(device: Device, size: float, *, between: bool) -> float:
    """Seconds of a message to one rank."""
    link = device.between if between else device.inside
    return link.latency + size / link.bytes_per_second


def _latency(device: Device, near: int, nodes: int) -> float:
    return (near - 1) * device.inside.latency + math.ceil(math.log2(nodes)) * device.between.latency
