"""Eight gloo ranks that run every check of `test_execute.py` in one launch.

Usage: python realloc_ranks.py STORE_FILE COUNT (results: STORE_FILE.RANK.json)

The schedules of COUNT cases are made once; the ranks are forks that have them already.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import product
from pathlib import Path

import exec_checks
import torch
import torch.distributed as dist
from schedule_cases import LAYOUTS, NODES, RELATIONS, first_rank, masters, random_pair, weights

from realflow.layout import Box, Layout, box_size, lengths
from realflow.realloc import Reallocation, Schedule, Tensors, transfers
from realflow.realloc.buckets import Buckets
from realflow.realloc.storage import Storage

WORLD = 8
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
STYLES = ("plain", "flat", "raw", "strided")


@cache
def truth(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The whole tensor: different in every element, and exact in bfloat16 so that casts are too."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).bfloat16()


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in box)]


def storage(specs: Tensors, rank: int, filled: bool, style: str) -> dict[str, list[Storage]]:
    """Storage for a rank's boxes, with the truth or -1 everywhere.

    `flat`: all in one buffer; `raw`: in one buffer of bytes; `strided`: matrices transposed, in gaps.
    """
    boxes = [
        (name, box, DTYPES[spec.itemsize])
        for name, spec in specs.items()
        for box in dict.fromkeys(box for holder, box in spec.holders if holder == rank)
    ]
    size = sum(box_size(box) * dtype.itemsize + 8 for _, box, dtype in boxes)
    room = torch.zeros(size, dtype=torch.uint8)
    held: dict[str, list[Storage]] = {name: [] for name in specs}
    at = 0
    for name, box, dtype in boxes:
        shape = lengths(box)
        strides = torch.empty(shape, device="meta").stride()
        if style == "strided" and len(shape) == 2:
            gaps = torch.zeros(shape[1] + 2, shape[0] + 3, dtype=dtype)
            bound = Storage.of(box, gaps[1:-1, 3:].t())
        elif style in ("flat", "raw"):
            at += -at % dtype.itemsize
            tensor = room if style == "raw" else room[: size // dtype.itemsize * dtype.itemsize].view(dtype)
            bound = Storage(box, tensor, at // dtype.itemsize, strides, dtype)
            at += box_size(box) * dtype.itemsize
        else:
            bound = Storage.of(box, torch.empty(shape, dtype=dtype))
        bound.view().copy_(
            part_of(truth(name, tuple(specs[name].shape)), box)
        ) if filled else bound.view().fill_(-1)
        held[name].append(bound)
    return held


def equal(one: Mapping[str, list[Storage]], other: Mapping[str, list[Storage]]) -> bool:
    return all(
        torch.equal(a.view(), b.view()) and a.box == b.box
        for name in one
        for a, b in zip(one[name], other[name], strict=True)
    )


@dataclass(frozen=True)
class Case:
    """A pair of layouts, both schedules between them, and how the storage lies."""

    what: str
    src: Tensors
    dst: Tensors
    there: Schedule
    back: Schedule
    bucket: int
    alone: int
    styles: tuple[str, str]
    apart: tuple[int, ...] = ()
    """Ranks that share no memory with others: their messages go through sockets."""

    def shared_bytes(self, schedule: Schedule, rank: int) -> int:
        """Bytes that a rank sends through memory that it shares with the destination."""
        sent = [t for t in schedule.transfers if t.source == rank and not {*t.pair} & {*self.apart}]
        return sum(map(schedule.bytes_of, sent))


APART = ((), (), (0, 3, 5), (), (), tuple(range(WORLD)))


def case(
    what: str,
    src: Tensors,
    dst: Tensors,
    nodes: dict[int, str] | None,
    draw: random.Random,
    apart: tuple[int, ...],
) -> Case:
    split = draw.choice([64, 4096, 1 << 16])
    there, back = (transfers(a, b, nodes, min_split_bytes=split) for a, b in ((src, dst), (dst, src)))
    return Case(
        what,
        src,
        dst,
        there,
        back,
        bucket=draw.choice([4096, 65536, 1 << 20]),
        alone=draw.choice([256, 2048, 1 << 20]),
        styles=(draw.choice(STYLES), draw.choice(STYLES)),
        apart=apart,
    )


def strata() -> dict[tuple[str, str], list[tuple[Layout, Layout]]]:
    """All pairs of layouts on the ranks there are, by relation of the ranks and by what changes."""
    found: dict[tuple[str, str], list[tuple[Layout, Layout]]] = {}
    for relation, (one, other) in product(RELATIONS, product(LAYOUTS, LAYOUTS)):
        if max(one.size, first_rank(relation, one, other) + other.size) <= WORLD:
            changed = "".join(
                axis for axis in ("dp", "tp", "pp") if getattr(one, axis) != getattr(other, axis)
            )
            found.setdefault((relation, changed), []).append((one, other))
    return found


def cases(count: int) -> Iterator[Case]:
    """`count` cases, in turn from every stratum and of every kind."""
    draw = random.Random(3)
    groups = strata()
    order = sorted(groups)
    for index in range(count):
        relation, changed = order[index % len(order)]
        one, other = draw.choice(groups[relation, changed])
        kind = ("weights", "weights on two nodes", "masters to weights", "masters")[index // 2 % 4]
        first = first_rank(relation, one, other)
        src = masters(one) if "masters" in kind else weights(one)
        dst = masters(other, first) if kind == "masters" else weights(other, first)
        nodes = NODES if "nodes" in kind else None
        yield case(
            f"{kind} {one} -> {other}, {relation} ranks", src, dst, nodes, draw, APART[index % len(APART)]
        )


def random_cases(count: int) -> Iterator[Case]:
    """Ragged, overlapping and many boxes, on several nodes, with casts. Back again only where the first
    layout is one that can be a destination: a rank may hold an element of a source twice."""
    draw = random.Random(4)
    while count:
        src, dst, nodes = random_pair(draw)
        ranks = {rank for specs in (src, dst) for spec in specs.values() for rank, _ in spec.holders}
        if not ranks or max(ranks) >= WORLD:
            continue
        there = transfers(src, dst, nodes, min_split_bytes=16)
        styles = (draw.choice(STYLES), draw.choice(STYLES))
        yield Case("random", src, dst, there, there, 4096, 64, styles, APART[count % len(APART)])
        count -= 1


def wires(src: Tensors, dst: Tensors) -> dict[str, torch.dtype]:
    return {name: DTYPES[min(src[name].itemsize, dst[name].itemsize)] for name in dst}


def check_case(chosen: Case, rank: int) -> None:
    """A -> B -> A: B equals the truth, a fresh A equals the first one, and no byte too many was sent."""
    first = storage(chosen.src, rank, filled=True, style=chosen.styles[0])
    middle = storage(chosen.dst, rank, filled=False, style=chosen.styles[1])
    buckets = Buckets(chosen.bucket, alone_bytes=chosen.alone, shared=rank not in chosen.apart)
    wire = wires(chosen.src, chosen.dst)
    forth = Reallocation(chosen.there.part(rank), rank, None, first, middle, buckets, wire)
    moved = forth.run()
    assert equal(middle, storage(chosen.dst, rank, filled=True, style="plain")), "the destination differs"
    forth.verify()
    assert moved.shared_bytes == chosen.shared_bytes(chosen.there, rank), "the wrong way"
    total = torch.tensor([moved.sent_bytes, moved.received_bytes])
    dist.all_reduce(total)
    assert total.tolist() == [chosen.there.bytes] * 2, (total, chosen.there.bytes)
    assert chosen.there.bytes == chosen.there.lower_bound_bytes, "more moves than is missing"
    assert buckets.held_bytes <= 2 * chosen.bucket
    if chosen.back is not chosen.there:
        assert chosen.back.bytes == chosen.back.lower_bound_bytes
        last = storage(chosen.src, rank, filled=False, style=chosen.styles[0])
        back = Reallocation(chosen.back.part(rank), rank, None, middle, last, buckets, wire)
        back.run()
        assert equal(first, last), "A -> B -> A is not the identity"


def check_drop(rank: int) -> list[str]:
    """The control: without one transfer (on both ends, so nothing hangs) both checks fail at its end."""
    src, dst = weights(Layout(2, 1, 1)), weights(Layout(1, 4, 1))
    whole = transfers(src, dst)
    dropped = whole.transfers[0]
    less = replace(whole, transfers=tuple(whole.transfers)[1:])
    first, middle = storage(src, rank, True, "plain"), storage(dst, rank, False, "plain")
    Reallocation(less.part(rank), rank, None, first, middle).run()
    noticed = []
    if not equal(middle, storage(dst, rank, filled=True, style="plain")):
        noticed.append("equal")
    task = Reallocation(whole.part(rank), rank, None, first, middle)
    noticed += exec_checks.differs(task, dropped.name, dropped.source, dropped.destination)
    assert bool(noticed) == (rank == dropped.destination), noticed
    return noticed


def run(rank: int, store: str, chosen: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(minutes=10),
    )
    for one in chosen:
        try:
            check_case(one, rank)
        except Exception as error:
            raise AssertionError(f"rank {rank}: {one.what} ({one.styles}): {error}") from error
    noticed = check_drop(rank)
    done = exec_checks.run_all(rank)
    dist.barrier()
    dist.destroy_process_group()
    relayed = sum(any(t.hop for t in one.there.transfers) for one in chosen)
    result = {"rank": rank, "noticed": noticed, "done": done, "relayed": relayed, "cases": len(chosen)}
    result["apart"] = sum(bool(one.apart) for one in chosen)
    Path(f"{store}.{rank}.json").write_text(json.dumps(result))


def main() -> None:
    count = int(sys.argv[2])
    chosen = [*cases(count), *random_cases(count // 8)]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(rank, sys.argv[1], chosen), daemon=True) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join()
            if process.exitcode:
                sys.exit(f"a rank failed with {process.exitcode}")
    finally:
        for process in ranks:
            process.kill()


if __name__ == "__main__":
    main()
