"""The values of a plan. Frozen, without I/O, without torch.

A plan holds the resolved graph, the cluster, where and how each call runs, what is reallocated and
offloaded, and what the planner expects (seconds, memory by cause, a lower bound and the gap to it;
None where nothing has been estimated).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from realflow.graph.types import Graph
from realflow.layout import DeviceMesh, Layout

FORMAT = 1

CAUSES = (
    "process",
    "weights",
    "offloaded",
    "masters",
    "optimizer",
    "gradients",
    "kv_cache",
    "buckets",
    "activations",
    "logits",
    "messages",
    "margin",
)
"""What takes memory on a rank, in the order in which it is written."""

AT, SPARE = "at", "to_spare"
"""Beside the causes of a rank: what is under way at the worst moment, and the bytes that are left."""

TRACK_MEMORY = "track_memory"
"""The key under a plan's `extra` that makes its run record the peaks of memory."""

LENGTHS = "lengths"
"""The key under a plan's `extra` with the mean tokens of a `prompt` and a `response` that it is made for."""

Engine = Literal["native", "vllm", "python", "train", "infer"]


@dataclass(frozen=True)
class Node:
    """A machine: `devices` devices of one `kind` (a key of `planfile.kinds.RUNTIME_OF`).

    `memory_bytes` is that of one device: a share of the machine's memory where devices are CPUs.
    `inside` and `between` are the bytes a second that a device sends, and receives, within its node and
    to other nodes (None: not given).
    """

    name: str
    devices: int
    kind: str = "cpu"
    memory_bytes: int | None = None
    inside: float | None = None
    between: float | None = None


@dataclass(frozen=True)
class Cluster:
    """The machines. Ranks number the devices node by node; device names are `node:index`.

    The node name `local` is bound to whatever single machine the run starts on.
    """

    nodes: tuple[Node, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """Device names in rank order."""
        return tuple(f"{node.name}:{index}" for node in self.nodes for index in range(node.devices))


@dataclass(frozen=True)
class CallPlan:
    """How one call runs.

    `ranks` are in mesh order (pp, dp, tp). `micro_batch_tokens` is the budget of a packed
    micro-batch; `slots` the sequences that a generate call decodes at once on each replica.
    `after` says what happens when the call ends: `keep`; `offload` moves to host memory what the
    call alone needs (weights; of a train call gradients and optimizer states), until it runs again;
    `free` lets go of weights that reallocation brings again before the next use. Train calls run
    their micro-batches through the stages by `schedule`; `recompute` is activation checkpointing;
    `sequence_parallel` divides what lies between the blocks over the ranks of a tensor group.
    """

    ranks: tuple[int, ...]
    layout: Layout
    engine: Engine
    micro_batch_tokens: int = 4096
    slots: int = 32
    after: Literal["keep", "free", "offload"] = "keep"
    schedule: Literal["1f1b", "zero_bubble"] = "1f1b"
    recompute: bool = False
    sequence_parallel: bool = False
    predicted_seconds: float | None = None

    @property
    def mesh(self) -> DeviceMesh:
        """The call's ranks on its axes."""
        return DeviceMesh(self.ranks, self.layout)


@dataclass(frozen=True)
class ReallocPlan:
    """Weights of `model` move from the layout of call `source` to that of call `destination`.

    Where `follower` names a model that follows `model`, they move into that one instead, averaged, and
    `destination` is empty.
    """

    model: str
    source: str
    destination: str
    bytes: int
    lower_bound_bytes: int
    predicted_seconds: float | None = None
    follower: str = ""


@dataclass(frozen=True)
class TimelineEntry:
    """One interval of the predicted timeline of a step, in seconds from its begin."""

    what: str
    ranks: tuple[int, ...]
    start: float
    end: float


@dataclass(frozen=True)
class Plan:
    """Everything that the runtime needs to run a graph."""

    graph: Graph
    cluster: Cluster
    calls: Mapping[str, CallPlan]
    cards: Mapping[str, str] = field(default_factory=dict)
    """Model name -> hash of the card it was planned with."""
    reallocs: tuple[ReallocPlan, ...] = ()
    memory: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    """Rank -> cause (of `CAUSES`) -> bytes at the worst moment."""
    moments: Mapping[int, str] = field(default_factory=dict)
    """Rank -> what is under way then."""
    timeline: tuple[TimelineEntry, ...] = ()
    step_seconds: float | None = None
    lower_bound_seconds: float | None = None
    gap: float | None = None
    deadline_factor: float = 20.0
    deadline_floor_seconds: float = 1800.0
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Name of an input (`profile`, `catalogue`) -> its hash."""
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Short: the whole of a plan fills pages."""
        calls = ", ".join(f"{name}={call.layout}" for name, call in self.calls.items())
        return (
            f"Plan({self.graph.name!r}, devices={self.world_size}, calls=[{calls}], steps={self.graph.steps})"
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.cluster.devices)
