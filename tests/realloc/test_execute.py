"""Reallocation on four real gloo ranks: one launch for all checks (`realloc_ranks.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from realflow.errors import InputError
from realflow.realloc import TensorSpec, execute, replicated, transfers
from realflow.realloc.buckets import Buckets
from realflow.realloc.storage import Storage, local_shards

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(2100)  # a busy machine takes ten times as long as a quiet one
@pytest.mark.parametrize("count", [48, pytest.param(240, marks=pytest.mark.full)])
def test_eight_ranks_bit_equal_there_and_back(tmp_path: Path, count: int) -> None:
    """Pairs of layouts of every kind, and the checks of `exec_checks`, with the controls."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(Path(__file__).with_name("realloc_ranks.py"))
    process = subprocess.Popen(
        [sys.executable, script, str(tmp_path / "store"), str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        output = process.communicate(timeout=1800)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    results = {rank: json.loads((tmp_path / f"store.{rank}.json").read_text()) for rank in range(8)}
    assert {result["cases"] for result in results.values()} == {count + count // 8}
    assert min(result["relayed"] for result in results.values()) >= count // 16
    assert min(result["apart"] for result in results.values()) >= count // 3, "through sockets"
    # The controls: each noticed by one rank only, in every way that there is.
    assert [r["noticed"] for r in results.values() if r["noticed"]] == [["equal", "verify"]]
    done = {rank: r["done"] for rank, r in results.items()}
    assert {rank: d["check_corrupted_byte"] for rank, d in done.items() if d["check_corrupted_byte"]} == {
        3: ["verify"]
    }
    same = "do not mean the same messages; the schedule, the bucket sizes and the dtypes on the way must be"
    said = {rank: d["check_disagreement"] for rank, d in done.items() if d["check_disagreement"]}
    assert said == {rank: [f"realloc: ranks 0 and 1 {same} the same on both"] * 2 for rank in (0, 1)}
    said = {rank: d["check_bystanders"] for rank, d in done.items() if d["check_bystanders"]}
    assert said == {rank: [f"realloc: ranks 3 and 4 {same} the same on both"] for rank in range(8)}
    said = {rank: d["check_unmapped"] for rank, d in done.items() if d["check_unmapped"]}
    assert said == {3: ["rank 3 has not got the memory of rank 0"], 5: ["rank 5 has no memory to share"]}


def test_storage_that_does_not_fit_is_refused_before_anything_is_sent() -> None:
    schedule = transfers(replicated({"w": (4, 2)}, 4, [0]), replicated({"w": (4, 2)}, 4, [1]))
    box = ((0, 4), (0, 2))
    with pytest.raises(InputError, match="no storage"):
        execute(schedule, 0, None, {}, {})
    with pytest.raises(InputError, match="would move 8 bytes an element"):
        execute(schedule, 0, None, {"w": [Storage.of(box, torch.zeros(4, 2, dtype=torch.float64))]}, {})
    with pytest.raises(InputError, match=r"shape \(2, 4\)"):
        Storage.of(box, torch.zeros(2, 4))


def test_local_shards_want_one_box() -> None:
    spec = TensorSpec((4,), 4, ((0, ((0, 1),)), (0, ((2, 3),)), (1, ((0, 4),))))
    tensor = torch.zeros(4)
    assert local_shards({"w": spec}, 1, {"w": tensor})["w"][0].tensor is tensor
    assert local_shards({"w": spec}, 5, {})["w"] == []
    with pytest.raises(InputError, match="2 boxes"):
        local_shards({"w": spec}, 0, {"w": tensor})


def test_buckets_are_reused_and_bounded() -> None:
    buckets = Buckets(1024)
    slots = buckets.slots("send", 100)
    assert [slot.numel() for slot in slots] == [100, 100]
    assert buckets.slots("send", 80)[0] is slots[0]
    assert [slot.numel() for slot in buckets.slots("send", 512)] == [512, 512]
    with pytest.raises(InputError):
        Buckets(8)
