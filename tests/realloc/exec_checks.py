"""Checks of single abilities, run by all ranks of `realloc_ranks.py` after the pairs of layouts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from realflow.errors import InputError, RunError
from realflow.layout import Box, box_size, cut, full_box
from realflow.realloc import Reallocation, TensorSpec, execute, replicated, transfers, verify
from realflow.realloc.buckets import Buckets
from realflow.realloc.storage import Computed, Storage, local_shards

HIDDEN, HEADS, EXPERTS, RANKS = 48, 6, 5, range(8)


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def differs(task: Reallocation, name: str, source: int, destination: int, share: float = 1.0) -> list[str]:
    """Whether `verify` finds a difference; it must name the parameter and both ranks."""
    try:
        task.verify(share)
    except RunError as error:
        text = str(error)
        assert name in text and re.search(rf"rank {source}\b", text), text
        assert re.search(rf"rank {destination}\b", text), text
        return ["verify"]
    return []


def rows_of(shape: tuple[int, ...], ranks: range) -> tuple[tuple[int, Box], ...]:
    """A tensor cut along its first dim."""
    return tuple((rank, (cut(shape[0], len(ranks), i), *full_box(shape[1:]))) for i, rank in enumerate(ranks))


def check_fused_and_stacked(rank: int) -> None:
    """q, k, v -> one fused matrix interleaved by head; experts one by one -> one stacked tensor, which
    lies transposed (input dim first); from t2 to whole on all ranks."""
    head = HIDDEN // HEADS
    shapes = dict.fromkeys(("q", "k", "v"), (HIDDEN, HIDDEN))
    shapes |= {f"experts.{i}": (HIDDEN, 2 * HIDDEN) for i in range(EXPERTS)}
    whole = {name: values(shape, index) for index, (name, shape) in enumerate(shapes.items())}
    src = {name: TensorSpec(shape, 4, rows_of(shape, range(2))) for name, shape in shapes.items()}
    dst = replicated(shapes, 4, RANKS)
    read = {
        name: [Storage.of(box, whole[name][slice(*box[0])]) for holder, box in spec.holders if holder == rank]
        for name, spec in src.items()
    }
    fused = torch.zeros(HEADS, 3, head, HIDDEN)  # head h: its rows of q, then of k, then of v
    stacked = torch.zeros(EXPERTS, 2 * HIDDEN, HIDDEN)
    write = {
        f"experts.{i}": [
            Storage(
                full_box(shapes["experts.0"]), stacked, i * 2 * HIDDEN * HIDDEN, (1, HIDDEN), torch.float32
            )
        ]
        for i in range(EXPERTS)
    }
    # One box a head: a matrix whose rows lie in several runs has several boxes.
    dst |= {
        name: TensorSpec(
            (HIDDEN, HIDDEN),
            4,
            tuple((r, ((h * head, (h + 1) * head), (0, HIDDEN))) for r in RANKS for h in range(HEADS)),
        )
        for name in ("q", "k", "v")
    }
    for place, name in enumerate(("q", "k", "v")):
        write[name] = [
            Storage(
                ((h * head, (h + 1) * head), (0, HIDDEN)),
                fused,
                (h * 3 + place) * head * HIDDEN,
                (HIDDEN, 1),
                torch.float32,
            )
            for h in range(HEADS)
        ]
    part = transfers(src, dst).part(rank)
    execute(part, rank, None, read, write)
    verify(part, rank, None, read, write)
    for i in range(EXPERTS):
        assert torch.equal(stacked[i].t(), whole[f"experts.{i}"])
    for place, name in enumerate(("q", "k", "v")):
        assert torch.equal(fused[:, place].reshape(HIDDEN, HIDDEN), whole[name])


def check_shared(rank: int) -> None:
    """Where both layouts are bound to one storage nothing is copied, and only what lacks is written."""
    shapes = {"w": (64, 96), "bias": (33,)}
    src, dst = replicated(shapes, 4, [2]), replicated(shapes, 4, RANKS)
    truth = {name: values(shape, 3) for name, shape in shapes.items()}
    tensors = {n: truth[n].clone() if rank == 2 else torch.full(s, -1.0) for n, s in shapes.items()}
    read, write = local_shards(src, rank, tensors), local_shards(dst, rank, tensors)
    task = Reallocation(transfers(src, dst).part(rank), rank, None, read, write)
    assert not task._copies
    task.run()
    assert all(torch.equal(tensors[name], truth[name]) for name in shapes)


def check_subgroup(rank: int) -> None:
    """A schedule names global ranks, also where the group has only some of them."""
    group = dist.new_group([1, 3])
    src, dst = replicated({"w": (4, 2)}, 4, [3]), replicated({"w": (4, 2)}, 4, [1])
    if rank in (1, 3):
        part = transfers(src, dst).part(rank)
        tensor = values((4, 2), 1) if rank == 3 else torch.zeros(4, 2)
        read, write = (local_shards(side, rank, {"w": tensor}) for side in (src, dst))
        task = Reallocation(part, rank, group, read, write)
        assert task.run().received_bytes == (32 if rank == 1 else 0)
        assert task.verify() == (1 if rank == 1 else 0)
        assert torch.equal(tensor, values((4, 2), 1))


def check_average(rank: int) -> None:
    """A reference model of float32 on all ranks follows a bfloat16 actor cut over two, three times.

    One rank has its part at home, others get theirs; relayed on two nodes as well.
    """
    shape = (40, 24)
    src = {"w": TensorSpec(shape, 2, rows_of(shape, range(2)))}
    actors = [values(shape, seed, torch.bfloat16) for seed in range(3)]
    reference = values(shape, 9)
    expected = reference.clone()
    actor = torch.zeros_like(actors[0])
    dst = replicated({"w": shape}, 4, RANKS)
    read = {"w": [Storage.of(b, actor[slice(*b[0])]) for r, b in src["w"].holders if r == rank]}
    part = transfers(src, dst).part(rank)
    task = Reallocation(
        part, rank, None, read, local_shards(dst, rank, {"w": reference}), wire=torch.bfloat16, decay=0.9
    )
    for weights in actors:
        actor.copy_(weights)
        task.run(record=True)
        task.verify()
        expected = expected * torch.tensor(0.9) + weights.float() * torch.tensor(0.1)
        assert torch.equal(reference, expected), (reference - expected).abs().max()
    try:
        task.run()
        task.verify()
    except InputError as error:
        assert "record=True" in str(error)
    else:
        assert rank == 0 or not part.transfers, "an average was verified against nothing"
    _relayed_average(rank)


def _relayed_average(rank: int) -> None:
    """Same dtypes: relays pass on their averages. Different ones: refused, for it would be rounded."""
    shape = (40, 24)
    nodes = {r: f"n{r // 4}" for r in RANKS}
    actor, reference = values(shape, 1), values(shape, 2)
    src, dst = replicated({"w": shape}, 4, [0]), replicated({"w": shape}, 4, RANKS)
    part = transfers(src, dst, nodes).part(rank)
    read = local_shards(src, rank, {"w": actor})
    Reallocation(part, rank, None, read, local_shards(dst, rank, {"w": reference}), decay=0.25).run()
    assert torch.equal(reference, values(shape, 2) * 0.25 + actor * 0.75)
    src = replicated({"w": shape}, 2, [0])
    part = transfers(src, dst, nodes).part(rank)
    read = local_shards(src, rank, {"w": actor.bfloat16()})
    relays = any(t.hop and rank in t.pair for t in part.transfers)
    try:
        Reallocation(
            part, rank, None, read, local_shards(dst, rank, {"w": reference}), wire=torch.bfloat16, decay=0.5
        )
        assert not relays
    except InputError as error:
        assert relays and "relayed" in str(error)


def check_merge(rank: int) -> None:
    """base + scale * B @ A, made piece by piece at the sources, arrives cast to bfloat16 everywhere."""
    shape, inner, scale = (96, 80), 4, 0.5
    base, a, b = values(shape, 1), values((inner, shape[1]), 2), values((shape[0], inner), 3)
    src = {"w": TensorSpec(shape, 4, ((0, full_box(shape)), (1, full_box(shape))))}
    dst = replicated({"w": shape}, 2, RANKS)
    pieces: list[Box] = []

    def merged(box: Box) -> torch.Tensor:
        pieces.append(box)
        rows, columns = (slice(*interval) for interval in box)
        return base[rows, columns] + scale * b[rows] @ a[:, columns]

    read = {"w": [Computed(full_box(shape), torch.float32, merged)]} if rank < 2 else {}
    target = torch.zeros(shape, dtype=torch.bfloat16)
    part = transfers(src, dst, min_split_bytes=64).part(rank)
    task = Reallocation(
        part, rank, None, read, local_shards(dst, rank, {"w": target}), Buckets(2048), torch.bfloat16
    )
    task.run()
    assert (target.float() - (base + scale * b @ a)).norm() <= 4e-3 * target.float().norm()
    assert (len(pieces) > 1) == (rank < 2), pieces
    assert max((box_size(box) for box in pieces), default=0) <= 512  # half a bucket of bfloat16
    task.verify()


def check_corrupted_byte(rank: int) -> list[str]:
    """One bit of one received byte is turned: found at its rank, also in a sample that has it."""
    shapes = {f"w{i}": (30, 20) for i in range(40)}
    src, dst = replicated(shapes, 2, [0]), replicated(shapes, 2, RANKS)
    tensors = {name: values((30, 20), 5, torch.bfloat16) for name in shapes}
    read = local_shards(src, rank, {name: tensor.clone() for name, tensor in tensors.items()})
    held = {name: torch.zeros(30, 20, dtype=torch.bfloat16) for name in shapes}
    task = Reallocation(transfers(src, dst).part(rank), rank, None, read, local_shards(dst, rank, held))
    task.run()
    counts = [task.verify(), task.verify(0.2, seed=1), task.verify(0.2, seed=2)]
    assert counts[0] == 40 and 0 < counts[1] < 20 and 0 < counts[2] < 20, counts
    if rank == 3:
        held["w7"].view(torch.uint8)[11, 5] ^= 1 << 6
    source = next(
        (t.source for t in task._bound.part.transfers if t.name == "w7" and t.destination == rank), 0
    )
    found = differs(task, "w7", source, 3)
    assert bool(found) == (rank == 3)
    return found


def check_disagreement(rank: int) -> list[str]:
    """Ranks that cut messages differently, or read the bytes as another dtype, would write nonsense: both
    say so in the same words."""
    noticed = []
    group = dist.new_group([0, 1])
    src, dst = replicated({"w": (64, 8)}, 2, [0]), replicated({"w": (64, 8)}, 2, [1])
    for buckets, dtype in (((128, 256), torch.bfloat16), ((256, 256), torch.float16)):
        if rank > 1:
            continue
        held = torch.zeros(64, 8, dtype=torch.bfloat16 if rank == 0 else dtype)
        side = src if rank == 0 else dst
        bound = local_shards(side, rank, {"w": held})
        task = Reallocation(transfers(src, dst).part(rank), rank, group, bound, bound, Buckets(buckets[rank]))
        noticed += refused(task)
    return noticed


def check_bystanders(rank: int) -> list[str]:
    """Each rank has a part for the next one. Rank 4 has other buckets than the rest: ranks that
    have nothing to do with it say the same; the next run, in which all agree, is as always."""
    src = {"w": TensorSpec((80, 8), 2, rows_of((80, 8), RANKS))}
    cuts = [min(80, 10 * r + 3) for r in range(9)]
    cuts[0], cuts[-1] = 0, 80
    boxes = tuple((r, ((cuts[r], cuts[r + 1]), (0, 8))) for r in RANKS)
    dst = {"w": TensorSpec((80, 8), 2, boxes)}
    truth = values((80, 8), 4, torch.bfloat16)
    read = {"w": [Storage.of(b, truth[slice(*b[0])]) for r, b in src["w"].holders if r == rank]}
    (mine,) = (b for r, b in boxes if r == rank)
    target = torch.zeros(mine[0][1] - mine[0][0], 8, dtype=torch.bfloat16)
    part = transfers(src, dst).part(rank)
    write = {"w": [Storage.of(mine, target)]}
    found = refused(Reallocation(part, rank, None, read, write, Buckets(64 if rank == 4 else 256)))
    assert not target.any(), "something moved"
    dist.barrier()
    execute(part, rank, None, read, write)
    assert torch.equal(target, truth[slice(*mine[0])])
    return found


def check_unmapped(rank: int) -> list[str]:
    """Rank 3 cannot map another's memory, rank 5 has none to share: both say so, all else is as ever."""
    src = {"w": TensorSpec((64, 8), 4, ((0, full_box((64, 8))),))}
    dst = replicated({"w": (64, 8)}, 4, RANKS)
    read = local_shards(src, rank, {"w": values((64, 8), 6)})
    target = torch.zeros(64, 8)
    buckets = Buckets()
    if rank in (3, 5):
        setattr(buckets, "of" if rank == 3 else "home", _unable)
    task = Reallocation(
        transfers(src, dst).part(rank), rank, None, read, local_shards(dst, rank, {"w": target}), buckets
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        moved = [task.run(), task.run()]
    assert torch.equal(target, values((64, 8), 6))
    assert [one.sent_bytes for one in moved] == [7 * 2048 if rank == 0 else 0] * 2
    assert [one.shared_bytes for one in moved] == [5 * 2048 if rank == 0 else 0] * 2
    texts = [str(one.message) for one in found if one.category is RuntimeWarning]
    assert all("(not today); weights go through sockets" in text for text in texts), texts
    return [text.removeprefix("realloc: ").split(" (")[0] for text in texts]


def _unable(*_: object) -> None:
    raise OSError("not today")


def refused(task: Reallocation) -> list[str]:
    """What `run` says where ranks do not agree."""
    try:
        task.run()
    except RunError as error:
        return [str(error)]
    return []


CHECKS: list[Callable[[int], object]] = [
    check_fused_and_stacked,
    check_shared,
    check_subgroup,
    check_average,
    check_merge,
    check_corrupted_byte,
    check_disagreement,
    check_bystanders,
    check_unmapped,
]


def run_all(rank: int) -> dict[str, object]:
    """Every check by name -> what it returned."""
    return {check.__name__: check(rank) for check in CHECKS}
