"""Reallocation against three other ways to change a layout, and against a send of packed bytes.

    python experiments/realloc/bench.py --model smollm2 --ranks 2 4 8 --rounds 5
    python experiments/realloc/bench.py --model 1b --ranks 2 4 --rounds 3

One gloo process a rank with one thread each. Everything is timed in turn in each round, from one
barrier to the slowest rank's end; the figures are medians. After its first round, every way must have
written every element rightly.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from realflow.realloc.buckets import ALONE_BYTES, BUCKET_BYTES, Buckets
from realflow.realloc.execute import Reallocation
from realflow.realloc.transfers import transfers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rivals
from models import MODELS, Pair, allocate, fill, pairs, right
from record import record

OURS, CEILING = "realloc", "packed send"


def measure(
    pair: Pair, rank: int, rounds: int, buckets: Buckets, folder: Path, quick: bool
) -> dict[str, Any]:
    """Median seconds of every way to go from one layout to the other."""
    schedule = transfers(pair.src, pair.dst)
    read, write = allocate(pair.src, rank), allocate(pair.dst, rank)
    fill(read, pair.src)
    started = time.perf_counter()
    ours = Reallocation(schedule.part(rank), rank, None, read, write, buckets)
    bound = time.perf_counter() - started
    saved = rivals.SaveAndLoad(pair.src, pair.dst, rank, read, write, folder)
    ways: dict[str, Callable[[], object]] = {
        OURS: ours.run,
        "gather and broadcast": rivals.GatherAndBroadcast(pair.src, pair.dst, rank, read, write).run,
        "broadcast of each parameter": rivals.BroadcastEach(pair.src, pair.dst, rank, read, write).run,
        "save and load (DCP)": saved.run,
        CEILING: rivals.PackedSend(schedule, rank).run,
    }
    if quick:
        ways = {name: ways[name] for name in (OURS, CEILING)}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first makes buffers and connections
        for name, way in ways.items():
            if turn == 0:
                wipe(write)
            seconds = timed(way)
            if turn:
                taken[name].append(seconds)
            elif name != CEILING:
                assert right(write, pair.dst), f"{name} left wrong weights on rank {rank}"
            if way == saved.run:
                saved.clean()
    return {
        "schedule": schedule,
        "bind_seconds": bound,
        "seconds": {n: statistics.median(t) for n, t in taken.items()},
    }


def wipe(held: dict[str, Any]) -> None:
    """Forget what is there."""
    for bound in held.values():
        for storage in bound:
            storage.view().fill_(-1)


def timed(way: Callable[[], object]) -> float:
    """Seconds until the slowest rank has done its part."""
    dist.barrier()
    started = time.perf_counter()
    way()
    seconds = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What is stored of a pair."""
    schedule, seconds = found["schedule"], found["seconds"]
    others = {name: value for name, value in seconds.items() if name not in (OURS, CEILING)}
    return {
        "moved_bytes": schedule.bytes,
        "lower_bound_bytes": schedule.lower_bound_bytes,
        "busiest_sender_bytes": max(schedule.sent_bytes.values(), default=0),
        "bind_seconds": round(found["bind_seconds"], 4),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "gb_per_second": round(schedule.bytes / seconds[OURS] / 1e9, 2),
        "of_packed_send": round(seconds[CEILING] / seconds[OURS], 3) if schedule.bytes else None,
        "times_faster_than": {name: round(value / seconds[OURS], 2) for name, value in others.items()},
    }


def serve(rank: int, world: int, folder: str, chosen: argparse.Namespace) -> None:
    """One rank: all pairs of one model."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    buckets = Buckets(chosen.bucket_megabytes * 2**20, alone_bytes=chosen.alone_kilobytes * 2**10)
    results = {}
    for pair in pairs(MODELS[chosen.model], world):
        if chosen.pair and not pair.name.startswith(chosen.pair):
            continue
        found = measure(pair, rank, chosen.rounds, buckets, Path(folder) / "checkpoint", chosen.quick)
        results[pair.name] = summary(found)
        if rank == 0:
            print(world, pair.name, results[pair.name], flush=True)
    dist.barrier()
    if rank == 0 and not chosen.no_record:
        path = Path(__file__).parent / "results" / f"{chosen.model}-{world}.json"
        settings = {"model": chosen.model, "ranks": world, "rounds": chosen.rounds}
        record(path, {**settings, "bucket_bytes": buckets.slot_bytes * 2, "pairs": results})
    dist.destroy_process_group()


def launch(world: int, chosen: argparse.Namespace) -> None:
    """Run `world` ranks, forks of this process, and end them all with it."""
    memory = Path("/dev/shm")  # so that the checkpoint need not wait for a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=serve, args=(rank, world, folder, chosen)) for rank in range(world)]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join()
                if process.exitcode:
                    sys.exit(f"a rank ended with {process.exitcode}")
        finally:
            for process in ranks:
                process.kill()


def main() -> None:
    """Measure one model on each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pair", help="only pairs whose name begins so, such as d4t1p1")
    parser.add_argument("--bucket-megabytes", type=int, default=BUCKET_BYTES >> 20)
    parser.add_argument("--alone-kilobytes", type=int, default=ALONE_BYTES >> 10)
    parser.add_argument("--quick", action="store_true", help="without the three other ways")
    parser.add_argument("--no-record", action="store_true")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for world in chosen.ranks:
        launch(world, chosen)


if __name__ == "__main__":
    main()
