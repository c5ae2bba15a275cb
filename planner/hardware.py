"""The catalogue: what devices and links can do at best, each number with its source.

`catalogue.yaml` beside this file holds the numbers. A node's `kind` in a cluster file is `cpu`, `cuda` or a
name of the catalogue; the runtime knows only `cpu` and `cuda`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Link:
    """A way for bytes: what one device sends, and receives at the same time, in a second; and the seconds
    before the first byte arrives."""

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class Device:
    """A device of the catalogue.

    `flops` has the peak of dense products by dtype (a CPU's: of one core), `memory_bytes` and
    `memory_bandwidth` (bytes a second) are those of one device. `inside` links it to devices of its node,
    `between` to those of other nodes, `host` to the host's memory. `launch` is the least seconds that
    one kernel takes. `sources` says for each number where it comes from.
    """

    name: str
    runtime: Literal["cpu", "cuda"]
    flops: Mapping[str, float]
    memory_bytes: int
    memory_bandwidth: float
    inside: Link
    between: Link
    host: Link
    launch: float
    sources: Mapping[str, str]
