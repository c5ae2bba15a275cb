"""The machines that a plan is made for: a cluster file, or this machine.

    nodes:
      - {name: node01, devices: 8, kind: cuda, memory: 80 GiB, inside: 450 GB/s, between: 50 GB/s}
      - {name: node02, devices: 8, kind: cuda, memory: 80 GiB, inside: 450 GB/s, between: 50 GB/s}

`memory` is that of one device (bytes, or a number with one of `_UNITS`); `kind` is cpu unless given, else
cuda or a device of the planner's catalogue, which then has what is left out here. `inside` and `between`
are what a device sends, and receives, within its node and to other nodes (bytes a second, or a number with
one of `_SPEEDS`; b is a bit); they are assumed where nobody gives them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.hardware import filled, gpu_kind
from realflow.errors import InputError, Problem
from realflow.graph.filekinds import refuse_other
from realflow.graph.schema import TEXT, Kind, Report, Section, Wrong, whole
from realflow.graph.yamlfile import load_yaml
from realflow.planfile import Cluster, Node
from realflow.planfile.read import DEVICE_KIND, MAX_DEVICES

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
_SPEEDS = {
    **{f"{unit}/s": float(size) for unit, size in _UNITS.items()},
    "Kb/s": 1e3 / 8,
    "Mb/s": 1e6 / 8,
    "Gb/s": 1e9 / 8,
    "Tb/s": 1e12 / 8,
}
_CPU_DEVICES = 2  # enough to show every part at work; more only where the machine has GPUs


def local_cluster(devices: int | None = None) -> Cluster:
    """This machine as a cluster of one node, `local`.

    Its devices are its GPUs; without GPUs, 2 CPU ranks (1 on a machine with one core). `devices`
    overrides the number: more than the GPUs is refused, CPU ranks may be more than cores. The
    memory of a CPU rank is an equal share of the machine's; that of a GPU is left open.
    """
    gpus = _gpus()
    if devices is None:
        devices = gpus or min(_CPU_DEVICES, os.cpu_count() or 1)
    if not 1 <= devices <= MAX_DEVICES:
        raise InputError(Problem(f"found {devices}; expected from 1 to {MAX_DEVICES}", where="devices"))
    if gpus:
        if devices > gpus:
            raise InputError(Problem(f"found {devices}, but this machine has {gpus} GPUs", where="devices"))
        return Cluster((filled(Node("local", devices, _gpu_kind())),))
    return Cluster((Node("local", devices, "cpu", _memory() // devices),))


def read_cluster(path: Path | str) -> Cluster:
    """Read a cluster file. Raises InputError with everything that is wrong in it."""
    problems: list[Problem] = []
    report = Report(load_yaml(Path(path), problems), problems)
    refuse_other(report.document, "cluster")
    top = report.section((), report.document.value, "a cluster file: a mapping with nodes")
    listed = top.need("nodes", NODES, [])
    nodes = [_node(report.section(("nodes", index), item)) for index, item in enumerate(listed)]
    top.close(["nodes"])
    for index, node in enumerate(nodes):
        if node.name in [other.name for other in nodes[:index]]:
            report.add(("nodes", index), f"a node {node.name} is given twice")
    report.finish()
    return Cluster(tuple(nodes))


def _node(section: Section) -> Node:
    node = Node(
        name=section.need("name", TEXT, ""),
        devices=section.need("devices", whole(1, MAX_DEVICES), 1),
        kind=section.take("kind", DEVICE_KIND, "cpu"),
        memory_bytes=section.take("memory", MEMORY, None),
        inside=section.take("inside", SPEED, None),
        between=section.take("between", SPEED, None),
    )
    section.close(["name", "devices", "kind", "memory", "inside", "between"])
    return filled(node)


def _read_amount(value: Any, units: Mapping[str, float]) -> float:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z/]*)", str(value))
    if match is None or isinstance(value, bool):
        negative = re.match(r"-\s*[\d.]", str(value))
        raise Wrong("it must be more than 0" if negative else "")
    if float(match[1]) <= 0:
        raise Wrong("it must be more than 0")
    if match[2] and match[2] not in units:
        alike = [unit for unit in units if unit.lower() == match[2].lower()]
        raise Wrong(f"did you mean {' or '.join(alike)}?" if alike else f"{match[2]} is no unit of it")
    return float(match[1]) * units.get(match[2], 1)


def _read_memory(value: Any) -> int:
    return int(_read_amount(value, _UNITS))


def _read_speed(value: Any) -> float:
    return _read_amount(value, _SPEEDS)


def _read_nodes(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Wrong
    if not value:
        raise Wrong("it is empty: give at least one, such as {name: node01, devices: 8, kind: cuda}")
    return value


MEMORY = Kind(f"bytes, such as 80 GiB (units: {', '.join(_UNITS)})", _read_memory)
SPEED = Kind(f"bytes a second, such as 50 GB/s (units: {', '.join(_SPEEDS)}; b is a bit)", _read_speed)
NODES = Kind("a list of nodes", _read_nodes)


def _gpus() -> int:
    """GPUs that this process may use, told by the driver's files (asking CUDA would need torch)."""
    folder = Path("/proc/driver/nvidia/gpus")
    present = len(list(folder.iterdir())) if folder.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    listed = [item for item in visible.split(",") if item.strip() and item.strip() != "-1"]
    return min(present, len(listed))


def _gpu_kind() -> str:
    """The catalogue's name of this machine's GPUs, `cuda` where they differ or are not in it."""
    told = [
        path.read_text(encoding="utf-8") for path in Path("/proc/driver/nvidia/gpus").glob("*/information")
    ]
    found = {gpu_kind(match[1]) for text in told if (match := re.search(r"^Model:\s*(.+)$", text, re.M))}
    return found.pop() if len(found) == 1 else "cuda"


def _memory() -> int:
    """Bytes of this machine's memory, or of the container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total
