"""Collectives, messages between two ranks, moves of weights and copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import torch
import torch.distributed as dist

from realflow.engines.collectives import reduce_scatter_sum
from realflow.layout import full_box
from realflow.models.causal import DTYPES
from realflow.models.residence import Residence
from realflow.profiling.bench import Bench, Job, Timed, clock
from realflow.profiling.request import Grids, Setting
from realflow.realloc.exchange import Reallocation
from realflow.realloc.pack import Side, move, rows, table
from realflow.realloc.plan import transfers
from realflow.realloc.specs import TensorSpec
from realflow.realloc.storage import Storage

_COLUMNS = 1024
_BATCH = 4
"""Collectives that are timed together."""


def message_jobs(
    bench: Bench, sizes: Sequence[int], threads: Mapping[int, int], dtype: str, grids: Grids
) -> Iterator[Job]:
    """Seconds of collectives on `dtype` by bytes, for groups of these sizes; `threads` are those of a run
    with that many ranks."""
    for ranks, what, size in product(sizes, ("all_reduce", "all_gather"), grids.messages):
        make = partial(_collective, bench, what, size, ranks, DTYPES[dtype])
        key: dict[str, str | int] = {"ranks": ranks, "dtype": dtype}
        yield Job(what, key, ("bytes",), (size,), Setting(threads[ranks], ranks), make)


def move_jobs(bench: Bench, sizes: Sequence[int], threads: Mapping[int, int], grids: Grids) -> Iterator[Job]:
    """Seconds of reduced gradients by bytes, for groups of these sizes; with the pairs, also of messages and
    of moved weights by bytes."""
    for ranks, size in product(sizes, grids.weights):
        make = partial(_scatter, bench, size, ranks)
        setting = Setting(threads[ranks], ranks)
        yield Job("reduce_scatter", {"ranks": ranks}, ("bytes",), (size,), setting, make)
    if 2 in sizes:
        pair = Setting(threads[2], 2)
        for size in grids.messages:
            yield Job("p2p", {}, ("bytes",), (size,), pair, partial(_ping, bench, size))
        for size in grids.weights:
            yield Job("realloc", {}, ("bytes",), (size,), pair, partial(_moves, bench, size))


def copy_jobs(bench: Bench, setting: Setting, grids: Grids) -> Iterator[Job]:
    """Seconds of copies within a rank's memory, and to host memory and back."""
    for size in grids.weights:
        yield Job("copy", {}, ("bytes",), (size,), setting, partial(_copies, bench, size))
        yield Job("host_copy", {}, ("bytes",), (size,), setting, partial(_offloads, bench, size))


def _collective(bench: Bench, what: str, size: int, ranks: int, dtype: torch.dtype) -> Timed:
    axis, device = bench.axis(ranks), bench.device
    data = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    mine = torch.zeros(len(data) // ranks, dtype=dtype, device=device)
    whole = torch.zeros(len(mine) * ranks, dtype=dtype, device=device)

    def work() -> dict[str, float]:
        began = clock(device)
        for _ in range(_BATCH):
            if what == "all_reduce":
                dist.all_reduce(data, group=axis.group)
            else:
                dist.all_gather_single(whole, mine, group=axis.group)
        return {"": (clock(device) - began) / _BATCH}

    return work


def _scatter(bench: Bench, size: int, ranks: int) -> Timed:
    axis, device = bench.axis(ranks), bench.device
    data = torch.zeros(size // 4 // ranks * ranks, device=device)
    result = torch.zeros(len(data) // ranks, device=device)

    def work() -> dict[str, float]:
        began = clock(device)
        if device.type == "cpu":
            reduce_scatter_sum(data, axis)
        else:
            dist.reduce_scatter_single(result, data, group=axis.group)
        return {"": clock(device) - began}

    return work


def _ping(bench: Bench, size: int) -> Timed:
    axis, device = bench.axis(2), bench.device
    data = torch.zeros(size, dtype=torch.uint8, device=device)

    def work() -> dict[str, float]:
        began = clock(device)
        for sender in (0, 1):
            if axis.index == sender:
                dist.send(data, group=axis.group, group_dst=1 - sender)
            else:
                dist.recv(data, group=axis.group, group_src=sender)
        return {"": (clock(device) - began) / 2}

    return work


def _moves(bench: Bench, size: int) -> Timed:
    """Weights of rank 0 into those of rank 1."""
    axis, device = bench.axis(2), bench.device
    shape = (size // 2 // _COLUMNS, _COLUMNS)
    box = full_box(shape)
    source, destination = ({"weight": TensorSpec(shape, 2, ((rank, box),))} for rank in (0, 1))
    held = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    mine = {"weight": [Storage.of(box, held)]}
    read, write = (mine, {}) if axis.index == 0 else ({}, mine)
    work_of = Reallocation(transfers(source, destination), axis.index, axis.group, read, write)

    def work() -> dict[str, float]:
        began = clock(device)
        work_of.run()
        return {"": clock(device) - began}

    return work


def _copies(bench: Bench, size: int) -> Timed:
    device = bench.device
    shape = (size // 2 // _COLUMNS, _COLUMNS)
    there = torch.zeros(shape[0], 2 * _COLUMNS, dtype=torch.bfloat16, device=device)[:, :_COLUMNS]
    here = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    source, target = (Side(0, 0, tuple(2 * s for s in one.stride()), one.dtype) for one in (there, here))
    moves = table(list(rows(shape, source, target)))

    def work() -> dict[str, float]:
        began = clock(device)
        move([there], moves, [here])
        return {"": clock(device) - began}

    return work


def _offloads(bench: Bench, size: int) -> Timed:
    device = bench.device
    residence = Residence(torch.zeros(size, dtype=torch.uint8, device=device))

    def work() -> dict[str, float]:
        began = clock(device)
        residence.offload()
        residence.restore()
        return {"": (clock(device) - began) / 2}

    return work
