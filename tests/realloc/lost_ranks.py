"""Two gloo ranks that share memory, of which one is lost in the middle of a reallocation.

Usage: python lost_ranks.py STORE_FILE (results: STORE_FILE.HOW.json, what the other rank said)
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from realflow.errors import RunError
from realflow.realloc import Reallocation, local_shards, replicated, transfers
from realflow.realloc.buckets import Buckets

exchange = importlib.import_module("realflow.realloc.exchange")
HOW = {  # who is lost, by what, and the seconds that a message may take
    "killed as it packs": (0, signal.SIGKILL, 100),
    "killed as it unpacks": (1, signal.SIGKILL, 100),
    "stopped as it unpacks": (1, signal.SIGSTOP, 5),
}
SHAPES = {f"w{index}": (64, 64) for index in range(8)}


def run(rank: int, store: str, how: str) -> None:
    """Rank 0 sends to rank 1, twice; the second time one of them does not come to its second kernel."""
    lost, number, deadline = HOW[how]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}.{how}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=deadline),
    )
    src, dst = replicated(SHAPES, 4, [0]), replicated(SHAPES, 4, [1])
    tensors = {name: torch.full(shape, float(rank)) for name, shape in SHAPES.items()}
    read, write = (local_shards(side, rank, tensors) for side in (src, dst))
    task = Reallocation(transfers(src, dst).part(rank), rank, None, read, write, Buckets(1 << 16))
    moved = task.run()
    assert moved.shared_bytes == moved.sent_bytes, moved
    kernel, calls = exchange.move, []

    def move(*arguments: object) -> None:
        calls.append(None)
        if rank == lost and len(calls) == 2:
            os.kill(os.getpid(), number)
        kernel(*arguments)

    exchange.move = move
    started = time.monotonic()
    try:
        task.run()
        said = "nothing"
    except RunError as error:
        said = str(error)
    result = {"said": said, "seconds": time.monotonic() - started, "shm": sorted(os.listdir("/dev/shm"))}
    Path(f"{store}.{how}.json").write_text(json.dumps(result))
    os._exit(0)  # a group with a lost rank need not be taken down


def main() -> None:
    fork = multiprocessing.get_context("fork")
    for how, (lost, *_) in HOW.items():
        ranks = [fork.Process(target=run, args=(rank, sys.argv[1], how), daemon=True) for rank in range(2)]
        for process in ranks:
            process.start()
        try:
            ranks[1 - lost].join(120)
        finally:
            for process in ranks:
                process.kill()


if __name__ == "__main__":
    main()
