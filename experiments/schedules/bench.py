"""How long making a schedule takes for large models on large clusters, on one core.

    python experiments/schedules/bench.py

Prints a table and stores it under experiments/schedules/results/. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
from rich.console import Console
from rich.table import Table

from realflow.realloc import MIN_SPLIT_BYTES, Tensors, transfers
from realflow.realloc.schedule import to_wire
from realflow.realloc.topology import Topology, loads

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from large_models import dense_layout, llama_70b, moe_1t, moe_layout, nodes  # noqa: E402
from record import record  # noqa: E402

REPEATS = 3
INSIDE, BETWEEN = 450e9, 50e9  # bytes a second of a rank inside its node and out of it


def main() -> None:
    """Measure, print and store."""
    rows = [measure(name, *make()) for name, make in CASES.items()]
    table = Table()
    for key in rows[0]:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=220).print(table)
    path = record(HERE / "results" / "schedules.json", {"schedules": rows})
    print("stored in", path.relative_to(HERE.parents[1]))


def dense() -> tuple[Tensors, Tensors, int]:
    """Llama 70B from d8t8p8 to d64t8p1 on the same 512 ranks."""
    shapes = llama_70b()
    return dense_layout(shapes, 80, 8, 8, 8), dense_layout(shapes, 80, 64, 8, 1), 512


def experts(stacked: bool, pp: int, ep: int) -> tuple[Tensors, Tensors, int]:
    """The mixture of experts from 8 stages of 128 ranks (64 of them hold all experts) to 512 ranks."""
    shapes = moe_1t(stacked)
    return moe_layout(shapes, 1024, 8, 64), moe_layout(shapes, 512, pp, ep), 1024


CASES: dict[str, Callable[[], tuple[Tensors, Tensors, int]]] = {
    "llama-70b d8t8p8 to d64t8p1": dense,
    "moe-1t stacked p8e64 to p1e64": lambda: experts(True, 1, 64),
    "moe-1t stacked p8e64 to p4e48": lambda: experts(True, 4, 48),
    "moe-1t separate p8e64 to p1e64": lambda: experts(False, 1, 64),
    "moe-1t separate p8e64 to p4e48": lambda: experts(False, 4, 48),
}


def measure(name: str, src: Tensors, dst: Tensors, ranks: int) -> dict[str, Any]:
    """Processor seconds of the schedule and of all slices, and how good the schedule is."""
    topology = Topology(nodes(ranks), inside=INSIDE, between_rank=BETWEEN)
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        schedule = transfers(src, dst, topology)
        seconds.append(time.process_time() - start)
    start = time.process_time()
    slices = [msgpack.packb(to_wire(schedule.part(rank))) for rank in range(ranks)]
    slicing = time.process_time() - start
    found = loads(schedule, topology)
    assert found.bytes == found.lower_bound_bytes
    assert found.busiest_sender is not None and found.floor_seconds is not None
    busiest = found.busiest_sender[1]
    assert busiest <= 1.05 * found.busiest_bound_bytes + MIN_SPLIT_BYTES
    return {
        "case": name,
        "parameters": len(src),
        "transfers": len(schedule.transfers),
        "schedule_s": round(statistics.median(seconds), 2),
        "slices_s": round(slicing, 2),
        "largest_slice_kb": round(max(map(len, slices)) / 1e3),
        "moved_tb": round(found.bytes / 1e12, 2),
        "relayed_tb": round(found.relayed_bytes / 1e12, 2),
        "busiest_over_bound": round(busiest / found.busiest_bound_bytes, 5),
        "floor_s": round(found.floor_seconds, 2),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


if __name__ == "__main__":
    main()
