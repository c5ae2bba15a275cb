"""Reallocation against three other ways to change a layout, and against a send of packed bytes.

    python experiments/realloc/bench.py

One gloo process a rank with one thread each. Reallocation takes turns with one other way after the
other, from one barrier to the slowest rank's end; the figures are medians. After its first round,
every way must have written every element rightly. Prints a line PASS or FAIL for each claim, and ends
with status 1 where one fails.
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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from realflow.realloc import Reallocation, transfers
from realflow.realloc.buckets import Buckets
from realflow.realloc.messages import ALONE_BYTES, BUCKET_BYTES
from realflow.realloc.pack import checksums

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rivals
from models import MODELS, Held, Pair, allocate, buffers, fill, pairs, right
from record import record

OURS, CEILING = "realloc", "packed send"
FAILED = 3  # status of a rank where a claim does not hold
OF_CEILING = 0.6  # what moved bytes over seconds must reach of the ceiling's


@dataclass(frozen=True)
class Runs:
    """Which numbers of ranks a model runs on, and how often: ours with the ceiling, ours with a rival."""

    ranks: tuple[int, ...]
    rounds: int
    rival_rounds: int


SUITE = {"smollm2": Runs((2, 4, 8), 5, 3), "1b": Runs((2, 4), 3, 1)}


def measure(pair: Pair, rank: int, runs: Runs, buckets: Buckets, folder: Path, quick: bool) -> dict[str, Any]:
    """Seconds of every way to go from one layout to the other, each beside ours in the same rounds."""
    schedule = transfers(pair.src, pair.dst)
    read, write = allocate(pair.src, rank), allocate(pair.dst, rank)
    fill(read, pair.src)
    started = time.perf_counter()
    ours = Reallocation(schedule.part(rank), rank, None, read, write, buckets)
    bound = time.perf_counter() - started
    wipe(write)
    timed(ours.run)
    shared = torch.tensor(ours.shared_bytes)
    dist.all_reduce(shared)
    assert right(write, pair.dst), f"{OURS} left wrong weights on rank {rank}"
    held = sums(write)
    both = (pair.src, pair.dst, rank, read, write)
    # Made one at a time: buffers of all of them would not fit beside both layouts of a large model.
    others: dict[str, Callable[[], rivals.Rival]] = {
        "gather and broadcast": lambda: rivals.GatherAndBroadcast(*both),
        "broadcast of each parameter": lambda: rivals.BroadcastEach(*both),
        "save and load (DCP)": lambda: rivals.SaveAndLoad(*both, folder),
    }
    seconds: dict[str, tuple[float, float]] = {}
    for name, make in others.items():
        if not quick:
            rival = make()
            wipe(write)
            timed(rival.run)
            assert sums(write) == held, f"{name} left wrong weights on rank {rank}"
            rival.clean()
            seconds[name] = beside(ours.run, rival, runs.rival_rounds)
            del rival
    ceiling = rivals.PackedSend(schedule, rank, write)
    timed(ceiling.run)
    seconds[CEILING] = beside(ours.run, ceiling, runs.rounds)
    return {
        "schedule": schedule,
        "shared_bytes": int(shared),
        "bind_seconds": bound,
        "seconds": seconds,
    }


def wipe(held: Held) -> None:
    """Forget what is there."""
    for flat in buffers(held):
        flat.fill_(-1)


def sums(held: Held) -> list[int]:
    """Checksums of what is there."""
    return [checksums(flat.view(torch.uint8), (0, 2 * len(flat)))[0] for flat in buffers(held)]


def beside(ours: Callable[[], object], rival: rivals.Rival, rounds: int) -> tuple[float, float]:
    """Median seconds of ours and of another way, in turn."""
    taken: list[tuple[float, float]] = []
    for _ in range(rounds):
        taken.append((timed(ours), timed(rival.run)))
        rival.clean()
    mine, theirs = zip(*taken, strict=True)
    return statistics.median(mine), statistics.median(theirs)


def timed(way: Callable[[], object]) -> float:
    """Seconds until the slowest rank has done its part."""
    dist.barrier()
    started = time.perf_counter()
    way()
    seconds = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What is stored of a pair. `seconds` of ours are those of the rounds with the ceiling."""
    schedule, seconds = found["schedule"], found["seconds"]
    mine, ceiling = seconds[CEILING]
    others = {name: pair for name, pair in seconds.items() if name != CEILING}
    return {
        "moved_bytes": schedule.bytes,
        "shared_bytes": found["shared_bytes"],
        "lower_bound_bytes": schedule.lower_bound_bytes,
        "busiest_sender_bytes": max(schedule.sent_bytes.values(), default=0),
        "bind_seconds": round(found["bind_seconds"], 4),
        "seconds": {OURS: round(mine, 4), **{name: round(pair[1], 4) for name, pair in seconds.items()}},
        "gb_per_second": round(schedule.bytes / mine / 1e9, 2),
        "of_packed_send": round(ceiling / mine, 3) if schedule.bytes else None,
        "times_faster_than": {name: round(theirs / own, 2) for name, (own, theirs) in others.items()},
    }


def judged(result: dict[str, Any]) -> dict[str, bool]:
    """Every claim about a pair and whether it holds. Where nothing is sent there is no ceiling."""
    claims = {f"faster than {name}": ratio > 1 for name, ratio in result["times_faster_than"].items()}
    claims["as few bytes as can be"] = result["moved_bytes"] == result["lower_bound_bytes"]
    if result["of_packed_send"] is not None:
        claims[f"at least {OF_CEILING} of a packed send"] = result["of_packed_send"] >= OF_CEILING
    return claims


def report(what: str, result: dict[str, Any]) -> None:
    """One line for each claim."""
    figures = {f"faster than {name}": ratio for name, ratio in result["times_faster_than"].items()}
    for claim, holds in result["claims"].items():
        figure = figures.get(claim, result["of_packed_send"] if "packed send" in claim else "")
        print("PASS" if holds else "FAIL", what, claim, figure, flush=True)


def serve(rank: int, world: int, folder: str, model: str, runs: Runs, chosen: argparse.Namespace) -> None:
    """One rank: all pairs of one model. Ends with status 1 where a claim fails."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    sizes = chosen.bucket_megabytes * 2**20, chosen.alone_kilobytes * 2**10
    buckets = Buckets(sizes[0], alone_bytes=sizes[1], shared=not chosen.sockets)
    results = {}
    for pair in pairs(MODELS[model], world):
        if chosen.pair and not pair.name.startswith(chosen.pair):
            continue
        found = measure(pair, rank, runs, buckets, Path(folder) / "checkpoint", chosen.quick)
        result = summary(found)
        results[pair.name] = {**result, "claims": judged(result)}
        if rank == 0:
            report(f"{model} on {world} ranks, {pair.name}:", results[pair.name])
    dist.barrier()
    if rank == 0 and not chosen.no_record:
        name = f"{model}-{world}{'-sockets' * chosen.sockets}.json"
        path = Path(__file__).parent / "results" / name
        transport = "sockets" if chosen.sockets else "shared memory"
        settings = {"transport": transport, "model": model, "ranks": world}
        often = {"rounds": runs.rounds, "rival_rounds": 0 if chosen.quick else runs.rival_rounds}
        record(path, {**settings, **often, "bucket_bytes": buckets.slot_bytes * 2, "pairs": results})
    dist.destroy_process_group()
    if not all(holds for result in results.values() for holds in result["claims"].values()):
        sys.exit(FAILED)


def launch(world: int, model: str, runs: Runs, chosen: argparse.Namespace) -> bool:
    """Run `world` ranks, forks of this process, and end them all with it; whether every claim held."""
    memory = Path("/dev/shm")  # so that the checkpoint need not wait for a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        fork = multiprocessing.get_context("fork")
        given = (world, folder, model, runs, chosen)
        ranks = [fork.Process(target=serve, args=(rank, *given)) for rank in range(world)]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join()
                if process.exitcode not in (0, FAILED):
                    sys.exit(f"a rank ended with {process.exitcode}")
        finally:
            for process in ranks:
                process.kill()
    return all(process.exitcode == 0 for process in ranks)


def main() -> None:
    """Measure every model on each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--ranks", type=int, nargs="+", help="2, 4 and 8; the large model on up to 4")
    parser.add_argument("--rounds", type=int, help="of ours and the ceiling")
    parser.add_argument("--rival-rounds", type=int, help="of ours and each other way")
    parser.add_argument("--pair", help="only pairs whose name begins so, such as d4t1p1")
    parser.add_argument("--bucket-megabytes", type=int, default=BUCKET_BYTES >> 20)
    parser.add_argument("--alone-kilobytes", type=int, default=ALONE_BYTES >> 10)
    parser.add_argument("--sockets", action="store_true", help="as between machines: without shared memory")
    parser.add_argument("--quick", action="store_true", help="without the three other ways")
    parser.add_argument("--no-record", action="store_true")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    held = True
    for model in chosen.model:
        usual = SUITE[model]
        runs = Runs(
            tuple(chosen.ranks or usual.ranks),
            chosen.rounds or usual.rounds,
            chosen.rival_rounds or usual.rival_rounds,
        )
        for world in runs.ranks:
            held &= launch(world, model, runs, chosen)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
