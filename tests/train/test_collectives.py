"""The reduce-scatter against sums of what each rank had."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from realflow.engines import collectives
from realflow.engines.collectives import Reducer, all_names
from realflow.models.place import Axis

RANKS = 4
CHUNK = 1000


def contribution(rank: int, size: int) -> torch.Tensor:
    return torch.randn(size * CHUNK, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    collectives.PIECE = 300  # several pieces, the last one smaller
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    groups = [dist.new_group(list(ranks)) for ranks in ((0, 1, 2, 3), (1, 3), (0, 2, 3))]
    results = {}
    for ranks, group in zip(((0, 1, 2, 3), (1, 3), (0, 2, 3)), groups, strict=True):
        if rank in ranks:
            axis = Axis(ranks, ranks.index(rank), group)
            reducer = Reducer(axis)
            datas = [contribution(rank, len(ranks)), contribution(rank + 10, len(ranks))]
            for data in datas:
                reducer.start(data)
            reducer.finish()
            own = slice(axis.index * CHUNK, (axis.index + 1) * CHUNK)
            results[len(ranks)] = torch.stack([data[own] for data in datas])
            reducer.close()
            assert all_names([f"r{rank}"] * (rank % 2), axis, data.device) == [
                f"r{r}" for r in ranks if r % 2
            ]
    everyone = Axis((0, 1, 2, 3), rank, groups[0])
    reducer, data = Reducer(everyone), contribution(rank, RANKS)
    dist.barrier()
    time.sleep(0.4 * (rank == 3))  # busy with its backward pass
    begin = time.perf_counter()
    reducer.start(data)
    started = time.perf_counter() - begin
    reducer.finish()
    finished = time.perf_counter() - begin
    reducer.close()
    results["beside"] = torch.tensor([started, finished])
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("collectives")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_rank, args=(port, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (1, 3), (0, 2, 3)])
def test_each_rank_has_its_part_of_the_sum(
    results: list[dict[int, torch.Tensor]], ranks: tuple[int, ...]
) -> None:
    size = len(ranks)
    for bucket in (0, 1):
        total = sum(contribution(rank + 10 * bucket, size) for rank in ranks)
        for index, rank in enumerate(ranks):
            part = total[index * CHUNK : (index + 1) * CHUNK]
            assert torch.allclose(results[rank][size][bucket], part, atol=1e-12, rtol=0)
            assert not torch.allclose(
                results[rank][size][bucket], part / size, atol=1e-3, rtol=0
            )  # no average


def test_the_caller_goes_on_while_buckets_are_reduced(results: list[dict[int, torch.Tensor]]) -> None:
    """Rank 3 comes late: the others wait for it in `finish`, not in `start`."""
    for started, finished in (results[rank]["beside"].tolist() for rank in range(3)):
        assert started < 0.2 < finished
