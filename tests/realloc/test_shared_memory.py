"""Memory that ranks of one machine share: who does, what it takes, and what is left of it."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planner.memory
from realflow.errors import RunError
from realflow.realloc import messages, shared
from realflow.realloc.buckets import Buckets
from realflow.realloc.shared import NOWHERE, Home, Segment, attach, machine_of, together

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
homes = st.builds(Home, st.sampled_from([NOWHERE, 1, 2]), st.integers(1, 9), st.integers(3, 9))


@given(st.lists(homes, min_size=2, max_size=8))
def test_ranks_of_one_machine_share_and_no_others(found: list[Home]) -> None:
    """From both sides alike, as transitive as being on one machine is, and nobody who shares nothing."""
    for rank, own in enumerate(found):
        others = {peer: home for peer, home in enumerate(found) if peer != rank}
        near = together(own, others)
        assert near == [r for r, home in others.items() if home.machine == own.machine and own.machine]
        assert all(rank in together(found[peer], {rank: own}) for peer in near)


def test_a_machine_is_told_by_its_kernel_its_processes_and_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine_of(CPU)
    assert here == machine_of(CPU) and 0 < here < 2**63
    assert machine_of(torch.device("cuda", 1)) == NOWHERE, "only tensors on the CPU"
    other = [("readlink", lambda path: "pid:[7]"), ("getuid", lambda: 12345)]
    for name, value in other:
        with monkeypatch.context() as patch:
            patch.setattr(shared.os, name, value)
            assert machine_of(CPU) not in (here, NOWHERE), name
    monkeypatch.setattr(shared.sys, "platform", "darwin")
    assert machine_of(CPU) == NOWHERE
    assert Buckets().home() == Home()


def test_what_one_writes_the_other_reads() -> None:
    segment = Segment(8192, 1)
    other = attach(segment.home)
    segment.memory[5000:5008] = torch.arange(8, dtype=torch.uint8)
    assert other[5000:5008].tolist() == list(range(8))
    assert other.data_ptr() != segment.memory.data_ptr()
    home = segment.home
    for wrong in ({"inode": home.inode + 1}, {"volume": home.volume + 1}, {"bytes": 4096}):
        with pytest.raises(OSError, match="is another file"):
            attach(replace(home, **wrong))
    with pytest.raises(OSError, match="No such file"):
        attach(replace(segment.home, process=2**22 + 1))


def test_nothing_is_left_and_nothing_has_a_name() -> None:
    """It is unmapped with the last tensor on it, and /dev/shm never saw it."""

    def mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("realflow-bucket")

    def named() -> tuple[int, list[str]]:
        """What this process maps of /dev/shm; names there (other processes have theirs) that tell of us."""
        names = [name for name in os.listdir("/dev/shm") if "realflow" in name]
        return Path("/proc/self/maps").read_text().count("/dev/shm/"), names

    before, names, files = mapped(), named(), len(os.listdir("/proc/self/fd"))
    buckets = Buckets(1 << 16)
    other = Buckets(1 << 16).of(3, buckets.home())
    part = other[:10]
    assert mapped() == before + 2
    assert named() == names
    del buckets
    assert mapped() == before + 1, "what a rank has mapped stays"
    del other
    assert part.sum() == 0
    del part
    assert mapped() == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_the_bucket_to_send_from_is_the_shared_one() -> None:
    buckets = Buckets(10_000)
    assert buckets.slots("send", 100)[0].storage_offset() == 0
    segment = attach(buckets.home())
    for size in (100, 5000):
        slots = buckets.slots("send", size)
        assert [len(slot) for slot in slots] == [size, size]
        for value, slot in enumerate(slots, 1):
            slot.fill_(value)
            first = slot.storage_offset()
            assert segment[first : first + size].tolist() == [value] * size
        assert buckets.held_bytes == 2 * size
    assert slots[1].storage_offset() >= 5000, "slots do not overlap"
    assert buckets.slots("receive", 100)[0].untyped_storage().nbytes() == 100
    assert buckets.home() is buckets.home()


def test_a_fork_does_not_write_to_its_parents_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    used, fresh = Buckets(4096), Buckets(4096)
    home = used.home()
    child = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: child)
    for use in (used.home, lambda: used.slots("send", 8)):
        with pytest.raises(RunError, match=f"process {child} has the buckets of process {home.process}"):
            use()
    assert fresh.home().process == child and len(fresh.slots("send", 8)) == 2


def test_what_others_share_is_mapped_to_be_read_alone() -> None:
    def access() -> list[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sorted(line.split()[1] for line in lines if "realflow-bucket" in line)

    before = access()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held = (mine := Segment(4096, 1)), attach(mine.home)
    found = access()
    assert len(held) == 2 and sorted([*before, "rw-s", "r--s"]) == found


def test_a_partner_is_mapped_once_and_anew_where_it_has_other_memory() -> None:
    mine, one, other = Buckets(4096), Buckets(4096), Buckets(4096)
    found = mine.of(1, one.home())
    assert mine.of(1, one.home()) is found
    other.slots("send", 8)
    other.home()
    other.slots("send", 8)[0].fill_(9)
    assert mine.of(1, other.home())[:8].tolist() == [9] * 8
    assert found[:8].tolist() == [0] * 8


def test_only_what_is_written_takes_memory() -> None:
    """Slots are of whole buckets' size and filled as far as messages are long."""
    segment = Segment(1 << 26, 1)

    def taken() -> int:
        return os.fstat(segment.home.descriptor).st_blocks * 512

    assert taken() == 0
    segment.memory[: 1 << 16].fill_(1)
    assert 1 << 16 <= taken() < 1 << 22


def test_plans_count_the_buckets_that_there_are() -> None:
    assert planner.memory.BUCKET_BYTES == messages.BUCKET_BYTES == 2 * Buckets().slot_bytes
    assert Buckets().home().bytes == messages.BUCKET_BYTES


@pytest.mark.timeout(400)
def test_a_lost_rank_ends_the_others(tmp_path: Path) -> None:
    """Killed or stopped in the middle, at either end, or in another run: the other raises, and nothing stays
    in /dev/shm."""
    names = sorted(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("lost_ranks.py")), str(tmp_path / "store")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=380)[0]
    finally:
        process.kill()
    lost = "from rank 0 to rank 1 failed"
    hows = dict.fromkeys(("killed as it packs", "killed as it unpacks", "stopped as it unpacks"), lost)
    hows["killed before it verifies"] = "rank 1 lost rank 0 while checksums were compared"
    hows["in another run"] = "from rank 0 of message 2 of hop 0 of run 2, .* of message 0 of hop 0 of run 3,"
    hows["in another run, unheeded"] = "nothing"  # the control: see its weights
    for how, said in hows.items():
        found = tmp_path / f"store.{how}.json"
        assert found.exists(), (how, output)
        result = json.loads(found.read_text())
        assert re.search(said, result["said"]), (how, result)
        if "in another run" in how:
            last = [0, 1, 2, 3] if "unheeded" in how else [-1] * 4
            assert result["weights"] == [0, 1, 2, 3, *last], how
        assert not [name for name in result["shm"] if name not in names and "realflow" in name], result
        if "killed" in how:
            assert result["seconds"] < 60, "it need not wait for its deadline"
