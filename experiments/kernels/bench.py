"""Bandwidth of the packing kernels against a plain copy of as many bytes with as many threads.

    python experiments/kernels/bench.py --threads 1 --megabytes 64 --rounds 15 --require 0.7

On the CPU the rival is memcpy, on a GPU a device-to-device copy; every result is first compared with
torch's, bit for bit, and on a GPU with the CPU's. Bytes count once (what is packed).
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from realflow.realloc.pack import Side, checksums, contiguous, move, rows, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import record

Views = list[torch.Tensor]
CAST = "float32 to bfloat16"
HIDDEN, ROW_BYTES = 2048, (512, 1024, 4096, 16384)


def splits(size: int, device: str) -> Iterator[tuple[str, Views]]:
    """What a rank packs when a bfloat16 model of `size` bytes a part is cut in each way."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randint(-(2**15), 2**15, (size,), dtype=torch.int16, generator=generator).to(device)
    for row in ROW_BYTES:  # half of the columns; rows of `row` bytes
        matrix = flat.view(-1, row)
        yield f"column, rows of {row} bytes", [matrix[:, : row // 2]]
    stacked = flat.view(-1, 1024, HIDDEN)
    yield "row, one half of each of many matrices", [stacked[:, :512]]
    yield "pipeline, whole matrices", list(flat[: size // 2].view(-1, 512, HIDDEN))
    yield "flat, one range of a buffer", [flat[1237 : 1237 + size // 2]]


def tables(views: Views) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The tables that pack views into a buffer and unpack them, and the packed bytes."""
    packing, unpacking = [], []
    packed = 0
    for index, view in enumerate(views):
        size = view.element_size()
        there = Side(index, 0, tuple(step * size for step in view.stride()), view.dtype)
        here = Side(0, packed, contiguous(view.shape, size), view.dtype)
        packing += rows(view.shape, there, here)
        unpacking += rows(view.shape, here, there)
        packed += view.numel() * size
    return table(packing), table(unpacking), packed


def seconds(work: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, all of them taken in turn so that a change of the machine meets all."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 2):
        for name, function in work.items():
            started = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def memcpy(threads: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """libc's memcpy, the bytes divided among threads (ctypes releases the interpreter's lock)."""
    pool = ThreadPoolExecutor(threads)

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        step = -(-len(target) // threads)
        parts = [(at, min(step, len(target) - at)) for at in range(0, len(target), step)]
        list(pool.map(lambda part: _one(target, source, *part), parts))

    return copy


def _one(target: torch.Tensor, source: torch.Tensor, at: int, size: int) -> None:
    ctypes.memmove(target.data_ptr() + at, source.data_ptr() + at, size)


def measure(size: int, rounds: int, device: str, threads: int) -> dict[str, dict[str, float]]:
    """Bandwidths of packing and unpacking every split, and their ratios to the copy's."""
    found = {}
    for name, views in splits(size, device):
        found[name] = contest(views, rounds, device, threads)
        print(device, name, found[name], flush=True)
    found[CAST] = cast(size, rounds, device)
    print(device, CAST, found[CAST], flush=True)
    return found


def contest(views: Views, rounds: int, device: str, threads: int) -> dict[str, float]:
    """One split: the bytes are right, and how fast they are packed and unpacked."""
    packing, unpacking, packed = tables(views)
    buffer, rival = (torch.empty(packed, dtype=torch.uint8, device=device) for _ in range(2))
    plain = torch.cat([view.reshape(-1) for view in views]).view(torch.uint8)
    move(views, packing, [buffer])
    assert torch.equal(buffer, plain), "other bytes than torch's"
    if device == "cuda":
        compare(views, packing, buffer)
    copy = memcpy(threads) if device == "cpu" else torch.Tensor.copy_
    work: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(rival, plain),
        "pack": lambda: move(views, packing, [buffer]),
        "unpack": lambda: move([buffer], unpacking, views),
    }
    taken = seconds(work, rounds, device)
    return {
        **{f"{what}_gb_per_second": round(packed / value / 1e9, 2) for what, value in taken.items()},
        "pack_ratio": round(taken["copy"] / taken["pack"], 3),
        "unpack_ratio": round(taken["copy"] / taken["unpack"], 3),
    }


def compare(views: Views, packing: torch.Tensor, buffer: torch.Tensor) -> None:
    """The GPU's bytes and checksum are those of the CPU."""
    there = torch.empty(len(buffer), dtype=torch.uint8)
    move(list(_whole(views)), packing, [there])
    assert torch.equal(there, buffer.cpu()), "the GPU packs other bytes than the CPU"
    assert checksums(there, (0, len(there))) == checksums(buffer, (0, len(buffer))), "another checksum"


def _whole(views: Views) -> Iterator[torch.Tensor]:
    """Views on copies of their storage: `cpu()` of a view alone would lose its strides."""
    for view in views:
        span = sum(step * (length - 1) for step, length in zip(view.stride(), view.shape, strict=True)) + 1
        flat = view.as_strided((span,), (1,)).cpu()
        yield flat.as_strided(view.shape, view.stride())


def cast(size: int, rounds: int, device: str) -> dict[str, float]:
    """Packing float32 masters as bfloat16, against torch's own cast."""
    source = torch.randn(size // 4).to(device)
    target, rival = (torch.empty(size // 4, dtype=torch.bfloat16, device=device) for _ in range(2))
    moves = table(list(rows(source.shape, Side(0, 0, (4,), source.dtype), Side(0, 0, (2,), target.dtype))))
    work: dict[str, Callable[[], object]] = {
        "torch": lambda: rival.copy_(source),
        "cast": lambda: move([source], moves, [target]),
    }
    taken = seconds(work, rounds, device)
    assert torch.equal(target, rival)
    return {
        **{f"{name}_seconds": round(value, 5) for name, value in taken.items()},
        "ratio": round(taken["torch"] / taken["cast"], 3),
    }


def main() -> None:
    """Measure on the CPU, and on a GPU if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=64, help="bytes packed")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--require", type=float, default=0.0, help="fail where packing is below this ratio")
    parser.add_argument("--no-record", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    size = chosen.megabytes * 2**20
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        found = measure(size, chosen.rounds, device, chosen.threads)
        slow = {name: row for name, row in found.items() if row.get("pack_ratio", 1.0) < chosen.require}
        if slow:
            sys.exit(f"slower than {chosen.require} of a copy: {slow}")
        if not chosen.no_record:
            settings = {"threads": chosen.threads, "megabytes": chosen.megabytes, "rounds": chosen.rounds}
            name = f"{device}-threads-{chosen.threads}.json" if device == "cpu" else "cuda.json"
            record(Path(__file__).parent / "results" / name, {**settings, "splits": found})


if __name__ == "__main__":
    main()
