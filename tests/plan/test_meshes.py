"""The runs of devices that calls may take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from search_scenes import gpus

from planner.meshes import places, pools
from realflow.planfile import Cluster


@given(nodes=st.integers(1, 9), width=st.integers(1, 9), any_length=st.booleans())
def test_runs_are_blocks_in_nodes_or_whole_nodes(nodes: int, width: int, any_length: bool) -> None:
    (pool,) = pools(gpus(nodes, width))
    found = places(pool, any_length=any_length)
    assert found[nodes * width] == (range(nodes * width),), "all devices are one run"
    assert len(found[1]) == nodes * width, "and so is each"
    for size, runs in found.items():
        assert len(set(runs)) == len(runs) and all(len(run) == size for run in runs)
        for run in runs:
            assert run.start >= 0 and run.stop <= nodes * width
            if size < width:
                assert run.start // width == (run.stop - 1) // width, "inside one node"
                assert run.start % width % size == 0, "aligned"
            else:
                assert run.start % width == run.stop % width == 0, "whole nodes"
    lengths = {size // width for size in found if size % width == 0}
    powers = {1 << bit for bit in range(8) if 1 << bit <= nodes} | {nodes}
    assert lengths >= (set(range(1, nodes + 1)) if any_length else powers)
    if any_length and nodes > 2:
        assert range(width, 3 * width) in found[2 * width], "from any node on"
    elif nodes > 2:
        assert range(width, 3 * width) not in found[2 * width]


def test_kinds_and_memories_are_pools_of_their_own() -> None:
    mixed = Cluster((*gpus(2).nodes, *gpus(1, kind="a100-80gb").nodes, *gpus(1, memory=40 << 30).nodes))
    found = pools(mixed)
    assert [(pool.first, len(pool.devices), pool.node.kind) for pool in found] == [
        (0, 16, "h100"), (16, 8, "a100-80gb"), (24, 8, "h100")
    ]  # fmt: skip
    for pool in found:
        for runs in places(pool).values():
            assert all(run.start in pool.devices and run.stop - 1 in pool.devices for run in runs)
