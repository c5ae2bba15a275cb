"""One of four gloo ranks that run every check of `test_execute.py` in one launch.

Usage: python realloc_ranks.py RANK STORE_FILE some|every
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from realflow.errors import RunError
from realflow.layout import Box, cut, flat_boxes, full_box
from realflow.realloc.buckets import Buckets
from realflow.realloc.execute import Reallocation, execute
from realflow.realloc.storage import Storage, local_shards
from realflow.realloc.transfers import Tensors, TensorSpec, replicated, transfers

WORLD = 4
SHAPES = {"embed": (257, 48), "w": (64, 96), "deep": (6, 5, 40), "bias": (33,), "scale": (), "none": (0, 4)}


def truth(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The whole tensor, equal on all ranks and different in every element."""
    generator = torch.Generator().manual_seed(len(name) * 1000 + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in box)]


def meshed(dp: int, tp: int, pp: int, ranks: list[int], itemsize: int, dim: int) -> dict[str, TensorSpec]:
    """d x t x p: tensors are dealt to stages, and cut along `dim` (or the last) over t."""
    specs = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        stage = index % pp
        holders = []
        for d in range(dp):
            for t in range(tp):
                box = list(full_box(shape))
                if shape:
                    chosen = min(dim, len(shape) - 1)
                    box[chosen] = cut(shape[chosen], tp, t)
                holders.append((ranks[(stage * dp + d) * tp + t], tuple(box)))
        specs[name] = TensorSpec(shape, itemsize, tuple(holders))
    return specs


def flat(ranks: list[int], itemsize: int) -> dict[str, TensorSpec]:
    """Each tensor as a flat buffer in even shards: several boxes a rank."""
    specs = {}
    for name, shape in SHAPES.items():
        size = truth(name, shape, torch.float32).numel()
        holders = [
            (rank, box)
            for index, rank in enumerate(ranks)
            for box in (flat_boxes(shape, *cut(size, len(ranks), index)) if shape else [()] * (index == 0))
        ]
        specs[name] = TensorSpec(shape, itemsize, tuple(holders))
    return specs


def storage(
    specs: Tensors, rank: int, dtype: torch.dtype, filled: bool, strided: bool
) -> dict[str, list[Storage]]:
    """Storage for a rank's boxes: the truth, or -1 everywhere; strided storage lies transposed or in gaps."""
    held: dict[str, list[Storage]] = {}
    for name, spec in specs.items():
        held[name] = []
        for box in dict.fromkeys(box for holder, box in spec.holders if holder == rank):
            value = part_of(truth(name, spec.shape, dtype), box)
            if strided and value.dim() == 2:
                room = torch.zeros(value.shape[1] + 2, value.shape[0] + 3, dtype=dtype)
                tensor = room[1:-1, 3:].t()
            else:
                tensor = torch.empty_like(value)
            tensor.copy_(value) if filled else tensor.fill_(-1)
            held[name].append(Storage.of(box, tensor))
    return held


def equal(one: dict[str, list[Storage]], other: dict[str, list[Storage]]) -> bool:
    return all(
        torch.equal(a.tensor, b.tensor) and a.box == b.box
        for name in one
        for a, b in zip(one[name], other[name], strict=True)
    )


def layouts(itemsize: int) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {
        "d4": replicated(SHAPES, itemsize, range(4)),
        "d1@2": replicated(SHAPES, itemsize, [2]),
        "d2@0,1": replicated(SHAPES, itemsize, [0, 1]),
        "t4": meshed(1, 4, 1, [0, 1, 2, 3], itemsize, 0),
        "t3@3,1,0": meshed(1, 3, 1, [3, 1, 0], itemsize, 1),
        "d2t2": meshed(2, 2, 1, [0, 1, 2, 3], itemsize, 1),
        "t2p2": meshed(1, 2, 2, [3, 2, 1, 0], itemsize, 0),
        "p2@2,3": meshed(1, 1, 2, [2, 3], itemsize, 0),
        "flat4": flat([0, 1, 2, 3], itemsize),
    }
    return found


def check_pair(
    src: Tensors, dst: Tensors, rank: int, dtype: torch.dtype, buckets: Buckets, strided: bool
) -> int:
    """A -> B -> A: B equals the truth, and a fresh A equals the first one."""
    there, back = transfers(src, dst, min_split_bytes=64), transfers(dst, src, min_split_bytes=64)
    first = storage(src, rank, dtype, filled=True, strided=False)
    middle = storage(dst, rank, dtype, filled=False, strided=strided)
    last = storage(src, rank, dtype, filled=False, strided=strided)
    forth = Reallocation(there.part(rank), rank, None, first, middle, buckets)
    moved = forth.run()
    forth.verify()
    assert equal(middle, storage(dst, rank, dtype, filled=True, strided=False)), "destination differs"
    total = torch.tensor([moved.sent_bytes, moved.received_bytes])
    dist.all_reduce(total)
    assert total.tolist() == [there.lower_bound_bytes] * 2, (total, there.lower_bound_bytes)
    execute(back.part(rank), rank, None, middle, last, buckets)
    assert equal(first, last), "A -> B -> A is not the identity"
    return there.bytes


def check_drop(rank: int) -> list[str]:
    """Without one transfer (on both ends, so nothing hangs) both checks fail at its destination."""
    src, dst = layouts(4)["d2@0,1"], layouts(4)["t4"]
    whole = transfers(src, dst)
    held = storage(src, rank, torch.float32, filled=True, strided=False)
    write = storage(dst, rank, torch.float32, filled=False, strided=False)
    dropped = whole.transfers[0]
    less = replace(whole, transfers=whole.transfers[1:])
    execute(less.part(rank), rank, None, held, write)
    noticed = []
    if not equal(write, storage(dst, rank, torch.float32, filled=True, strided=False)):
        noticed.append("equal")
    try:
        Reallocation(whole.part(rank), rank, None, held, write).verify()
    except RunError as error:
        assert dropped.name in str(error) and f"rank {dropped.source}" in str(error), error
        noticed.append("verify")
    assert bool(noticed) == (rank == dropped.destination), noticed
    return noticed


def check_shared(rank: int) -> None:
    """Where both layouts are bound to one storage nothing is copied, and only what lacks is written."""
    src, dst = replicated(SHAPES, 4, [2]), replicated(SHAPES, 4, range(4))
    tensors = {
        name: truth(name, shape, torch.float32) if rank == 2 else torch.full(shape, -1.0)
        for name, shape in SHAPES.items()
    }
    part = transfers(src, dst).part(rank)
    read, write = local_shards(src, rank, tensors), local_shards(dst, rank, tensors)
    execute(part, rank, None, read, write)
    assert all(torch.equal(tensors[n], truth(n, s, torch.float32)) for n, s in SHAPES.items())


def check_subgroup(rank: int) -> None:
    """A schedule names global ranks, also where the group has only some of them."""
    group = dist.new_group([1, 3])
    src, dst = replicated(SHAPES, 4, [3]), replicated(SHAPES, 4, [1])
    if rank in (1, 3):
        part = transfers(src, dst).part(rank)
        read = storage(src, rank, torch.float32, filled=True, strided=False)
        write = storage(dst, rank, torch.float32, filled=False, strided=False)
        task = Reallocation(part, rank, group, read, write)
        moved = task.run()
        assert moved.received_bytes == (part.bytes if rank == 1 else 0)
        checked = task.verify()
        assert checked == (len(part.transfers) if rank == 1 else 0)
        assert equal(write, storage(dst, rank, torch.float32, filled=True, strided=False))


def main() -> None:
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=WORLD)
    choose = random.Random(1)
    names = list(layouts(4))
    pairs = [
        (torch.float32, src, dst)
        for i, src in enumerate(names)
        for j, dst in enumerate(names)
        if sys.argv[3] == "every" or (j - i) % len(names) in (0, 1, 4)
    ]
    pairs += [(torch.bfloat16, src, dst) for src in layouts(2) for dst in choose.sample(list(layouts(2)), 2)]
    for dtype, src, dst in pairs:
        held = layouts(dtype.itemsize)
        buckets = Buckets(choose.choice([8192, 65536, 1 << 20]))
        check_pair(held[src], held[dst], rank, dtype, buckets, strided=choose.random() < 0.5)
    noticed = check_drop(rank)
    check_shared(rank)
    check_subgroup(rank)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps({"rank": rank, "pairs": len(pairs), "noticed": noticed}))


if __name__ == "__main__":
    main()
