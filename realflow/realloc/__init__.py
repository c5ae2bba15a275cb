"""Moving tensors from one layout to another: what moves (pure), moving it, and the proof.

    from realflow.realloc import Reallocation, Storage, TensorSpec, transfers

    schedule = transfers(src, dst)
    Reallocation(schedule.part(rank), rank, None, read, write).run()

Names are loaded on first use, so that what is pure imports no torch. No module in here may have one
of these names: it would take its place as soon as it is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realflow.realloc.buckets import Buckets
    from realflow.realloc.exchange import Moved, Reallocation, execute, verify
    from realflow.realloc.plan import MIN_SPLIT_BYTES, transfers
    from realflow.realloc.schedule import Schedule, Transfer, from_wire, to_wire
    from realflow.realloc.specs import Tensors, TensorSpec, replicated
    from realflow.realloc.storage import Bindings, Computed, Storage, local_shards
    from realflow.realloc.topology import Topology, loads

__all__ = [
    "MIN_SPLIT_BYTES",
    "Bindings",
    "Buckets",
    "Computed",
    "Moved",
    "Reallocation",
    "Schedule",
    "Storage",
    "TensorSpec",
    "Tensors",
    "Topology",
    "Transfer",
    "execute",
    "from_wire",
    "loads",
    "local_shards",
    "replicated",
    "to_wire",
    "transfers",
    "verify",
]

_HOMES = {
    "buckets": ("Buckets",),
    "exchange": ("Moved", "Reallocation", "execute", "verify"),
    "plan": ("MIN_SPLIT_BYTES", "transfers"),
    "schedule": ("Schedule", "Transfer", "from_wire", "to_wire"),
    "specs": ("TensorSpec", "Tensors", "replicated"),
    "storage": ("Bindings", "Computed", "Storage", "local_shards"),
    "topology": ("Topology", "loads"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"realflow.realloc.{home}"), name)
    raise AttributeError(f"module 'realflow.realloc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
