"""The catalogue: what devices and links can do at best, each number with its source.

`catalogue.yaml` beside this file holds the numbers. A node's `kind` in a cluster file is `cpu`, `cuda` or a
name of the catalogue; `cuda` alone is taken for `UNKNOWN_GPU`.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from realflow.errors import InputError, Problem
from realflow.planfile import Cluster, Node
from realflow.planfile.kinds import RUNTIME_OF

UNKNOWN_GPU = "h100"
"""What a node of kind `cuda` is taken for, where its GPU is not known."""


@dataclass(frozen=True)
class Link:
    """A way for bytes: what one device sends, and receives at the same time, in a second; and the seconds
    before the first byte arrives."""

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class Device:
    """A device of the catalogue.

    `flops` has the peak of dense products by dtype (a CPU's: of one core), `memory_bytes` (None: the
    cluster says) and `bandwidth` (bytes a second) are those of one device. `inside` links it to devices of
    its node, `between` to those of other nodes, `host` to the host's memory. A kernel takes at least
    `launch` seconds. Large products reach `achieved_flops` of the peak and large reads
    `achieved_bandwidth`; kernels of `ramp_flops` or `ramp_bytes` reach half of that. `sources` says for
    each number where it comes from.
    """

    name: str
    runtime: Literal["cpu", "cuda"]
    flops: Mapping[str, float]
    memory_bytes: int | None
    bandwidth: float
    inside: Link
    between: Link
    host: Link
    launch: float
    achieved_flops: float
    achieved_bandwidth: float
    ramp_flops: float
    ramp_bytes: float
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Catalogue:
    """Devices by name, and a hash of the file that they come from."""

    devices: Mapping[str, Device]
    hash: str


@cache
def catalogue() -> Catalogue:
    """The catalogue that comes with the planner."""
    return parse_catalogue(files("planner").joinpath("catalogue.yaml").read_text(encoding="utf-8"))


def parse_catalogue(text: str) -> Catalogue:
    """A catalogue from the text of its file. Raises InputError for a number that is missing, has no source
    or is not above 0."""
    document = yaml.safe_load(text)
    named = document["sources"]
    devices = {name: _Reader(name, entry, named).device() for name, entry in document["devices"].items()}
    return Catalogue(devices, hashlib.sha256(text.encode()).hexdigest()[:16])


def device(kind: str) -> Device:
    """What the catalogue says of a node's kind. Raises InputError for an unknown one."""
    known = catalogue().devices
    name = UNKNOWN_GPU if kind == "cuda" else kind
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(Problem(f"{kind!r} is no device; {hint}known: {', '.join(known)}", where="kind"))
    return known[name]


def filled(node: Node) -> Node:
    """A node of a catalogue kind, with the numbers that its cluster file leaves out."""
    if node.kind in ("cpu", "cuda"):
        return node
    known = device(node.kind)
    return replace(
        node,
        memory_bytes=node.memory_bytes or known.memory_bytes,
        inside=node.inside or known.inside.bytes_per_second,
        between=node.between or known.between.bytes_per_second,
    )


def node_device(node: Node) -> Device:
    """The device of a node, with the links and the memory that the cluster gives."""
    known = device(node.kind)
    return replace(
        known,
        memory_bytes=node.memory_bytes or known.memory_bytes,
        inside=replace(known.inside, bytes_per_second=node.inside or known.inside.bytes_per_second),
        between=replace(known.between, bytes_per_second=node.between or known.between.bytes_per_second),
    )


def gpu_kind(model: str) -> str:
    """The catalogue's name of a GPU from what its driver calls it (`NVIDIA H100 80GB HBM3`), `cuda` where it
    is not in the catalogue."""
    words = re.sub(r"[^a-z0-9]+", " ", model.lower()).split()
    if "a100" in words or any(word.startswith("a100") for word in words):
        return "a100-80gb" if "80gb" in words else "a100-40gb"
    if "pcie" in words or "nvl" in words:  # other numbers than those of the modules
        return "cuda"
    return next((name for name in catalogue().devices if name in words), "cuda")


def hardware_notes(cluster: Cluster) -> tuple[str, ...]:
    """What is assumed of a cluster's devices."""
    if any(node.kind == "cuda" for node in cluster.nodes):
        return (
            f"Hardware: kind cuda is taken for {UNKNOWN_GPU}; name the device in the cluster file "
            f"({', '.join(name for name in catalogue().devices if name != 'cpu')}).",
        )
    return ()


class _Reader:
    """One device of the file: each number is taken together with its source."""

    def __init__(self, name: str, entry: Mapping[str, Any], named: Mapping[str, str]) -> None:
        self._name, self._entry, self._named = name, entry, named
        self._sources: dict[str, str] = {}

    def device(self) -> Device:
        """All of it."""
        if RUNTIME_OF.get(self._name) != self._entry.get("runtime"):
            raise self._wrong("runtime", self._entry.get("runtime"), "what realflow.planfile.kinds has")
        memory = self._number("memory", maybe=True)
        return Device(
            name=self._name,
            runtime=self._entry["runtime"],
            flops={dtype: self._number("flops", dtype) for dtype in self._entry["flops"]},
            memory_bytes=int(memory) if memory else None,
            bandwidth=self._number("bandwidth"),
            inside=self._link("inside"),
            between=self._link("between"),
            host=self._link("host"),
            launch=self._number("launch"),
            achieved_flops=self._number("achieved", "flops"),
            achieved_bandwidth=self._number("achieved", "bandwidth"),
            ramp_flops=self._number("ramp", "flops"),
            ramp_bytes=self._number("ramp", "bytes"),
            sources=self._sources,
        )

    def _link(self, name: str) -> Link:
        return Link(self._number(name, "speed"), self._number(name, "latency"))

    def _number(self, *path: str, maybe: bool = False) -> float:
        """The number at a path, above 0 (0 stands for one that `maybe` is not given)."""
        found: Any = self._entry
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        where = ".".join(path)
        if not isinstance(found, list) or len(found) != 2 or found[1] not in self._named:
            raise self._wrong(where, found, "a number and the name of its source")
        value = found[0]
        if value is None and maybe:
            value = 0.0
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(where, value, "a number above 0")
        self._sources[where] = self._named[found[1]]
        return float(value)

    def _wrong(self, where: str, found: Any, expected: str) -> InputError:
        problem = Problem(f"found {found!r}; expected {expected}", where=f"devices.{self._name}.{where}")
        return InputError(problem)
