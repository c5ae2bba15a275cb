"""Two gloo ranks that share memory, of which one is lost in the middle of a reallocation.

Usage: python lost_ranks.py STORE_FILE (results: STORE_FILE.HOW.json, what the other rank said)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
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
    "killed before it verifies": (0, signal.SIGKILL, 100),
    "in another run": (0, None, 100),
    "in another run, unheeded": (0, None, 100),
}
SHAPES = {f"w{index}": (64, 64) for index in range(8)}
Tensors = dict[str, torch.Tensor]


class LeftError(Exception):
    """What a rank that leaves a run raises."""


def run(rank: int, store: str, how: str) -> None:
    """Rank 0 sends to rank 1, twice; the second time one of them does not come to its second kernel, or the
    sender leaves at its third and begins a third run. Written: what the other one says."""
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
    tensors = {name: torch.full(SHAPES[name], float(index)) for index, name in enumerate(SHAPES)}
    if rank:
        tensors = {name: torch.full(shape, -1.0) for name, shape in SHAPES.items()}
    read, write = (local_shards(side, rank, tensors) for side in (src, dst))
    task = Reallocation(transfers(src, dst).part(rank), rank, None, read, write, Buckets(1 << 16))
    moved = task.run()
    assert moved.shared_bytes == moved.sent_bytes, moved
    result: dict[str, object] = {}
    started = time.monotonic()
    try:
        if number is None:
            again(task, tensors, leaves=rank == lost, heeds="unheeded" not in how)
        elif "verifies" in how:
            if rank == lost:
                os.kill(os.getpid(), number)
            task.verify()
        else:
            on_kernel(2, lambda: os.kill(os.getpid(), number) if rank == lost else None)
            task.run()
        result["said"] = "nothing"
    except RunError as error:
        result["said"] = str(error)
    if rank == lost:
        os._exit(0)  # has nothing to say
    result |= {"seconds": time.monotonic() - started, "shm": sorted(os.listdir("/dev/shm"))}
    result["weights"] = [float(tensor[0, 0]) for tensor in tensors.values()]
    Path(f"{store}.{how}.json").write_text(json.dumps(result))
    os._exit(0)  # a group with a lost rank need not be taken down


def on_kernel(number: int, what: Callable[[], None]) -> None:
    """Do something instead of the kernel of that number from now on."""
    kernel, calls = exchange.move, []

    def move(*arguments: object) -> None:
        calls.append(None)
        if len(calls) == number:
            what()
        kernel(*arguments)

    exchange.move = move


def again(task: Reallocation, tensors: Tensors, leaves: bool, heeds: bool) -> None:
    """The sender leaves its second run at the third of four messages and begins a third one, as if that were
    not refused; the receiver is in the second one."""
    if not heeds:
        exchange._Exchange._agreed = lambda *told: None
    if not leaves:
        for tensor in tensors.values():
            tensor.fill_(-1)
        task.run()
        return

    def leave() -> None:
        raise LeftError

    on_kernel(3, leave)
    with contextlib.suppress(LeftError):
        task.run()
    task._whole = True
    task.run()
    os._exit(1)


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
