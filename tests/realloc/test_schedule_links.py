"""Topologies, what a schedule puts on links, casts, and slices on the wire."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import msgpack
import pytest
from schedule_cases import NODES, masters, weights
from schedule_oracle import audit

from realflow.errors import InputError
from realflow.layout import Layout, full_box
from realflow.realloc import TensorSpec, Transfer, replicated, transfers
from realflow.realloc.schedule import from_wire, to_wire
from realflow.realloc.topology import LinkLoad, Topology, loads

SHAPES = {"w": (1000, 500)}  # 1 MB in bfloat16
WHOLE = 1_000_000


def test_loads_count_every_link() -> None:
    topology = Topology({0: "a", 1: "a", 2: "b", 3: "b"}, inside=1e9, between_rank=1e8, between_node=1.5e8)
    schedule = transfers(replicated(SHAPES, 2, [0]), replicated(SHAPES, 2, range(4)), topology)
    found = loads(schedule, topology)
    assert (found.bytes, found.lower_bound_bytes, found.copied_bytes) == (3 * WHOLE, 3 * WHOLE, WHOLE)
    assert (found.between_nodes_bytes, found.relayed_bytes) == (WHOLE, WHOLE)
    assert schedule.node_bytes == {("a", "b"): WHOLE}
    assert found.busiest_sender == (0, 2 * WHOLE)
    assert found.busiest_bound_bytes == 2 * WHOLE
    links = {load.link: load for load in found.links}
    assert found.links[0] == LinkLoad("rank 0 sends to other nodes", WHOLE, pytest.approx(0.01))
    assert links["node a sends to other nodes"].seconds == pytest.approx(WHOLE / 1.5e8)
    assert links["node b receives from other nodes"].bytes == WHOLE
    assert links["rank 0 sends inside its node"] == LinkLoad("rank 0 sends inside its node", WHOLE, 0.001)
    assert links["rank 1 receives inside its node"].bytes == WHOLE
    received = [links[f"rank {rank} receives from other nodes"].bytes for rank in (2, 3)]
    assert sum(received) == WHOLE and max(received) <= WHOLE / 2 + 65536
    assert found.floor_seconds == pytest.approx(0.01)


def test_each_node_has_its_own_speeds() -> None:
    """Two fast ranks move inside their node; the slow node is used only by what comes to it."""
    topology = Topology(
        {0: "fast", 1: "fast", 2: "slow"}, inside={"fast": 1e9, "slow": 1e6}, between_rank={"fast": 1e8}
    )
    schedule = transfers(replicated(SHAPES, 2, [0]), replicated(SHAPES, 2, [1, 2]), topology)
    seconds = {load.link: load.seconds for load in loads(schedule, topology).links}
    assert seconds["rank 1 receives inside its node"] == WHOLE / 1e9
    assert seconds["rank 2 receives from other nodes"] is None, "not said of this node"
    slow = loads(schedule, Topology(topology.nodes, inside=1e6, between_rank=1e8)).floor_seconds
    assert slow != loads(schedule, topology).floor_seconds, "the control: one speed for all"
    with pytest.raises(InputError, match="inside must be more than 0"):
        Topology({0: "a"}, inside={"a": -1.0})


def test_the_bound_of_the_busiest_is_in_whole_elements() -> None:
    """Three elements from two ranks that have them all: one of them sends two."""
    shapes = {"w": (3,)}
    schedule = transfers(replicated(shapes, 4, [0, 1]), replicated(shapes, 4, [2]), min_split_bytes=1)
    assert schedule.busiest_bound_bytes % 4 != 0, "the case has to be one"
    found = loads(schedule)
    assert found.busiest_sender is not None and found.busiest_sender[1] == found.busiest_bound_bytes == 8


def test_loads_without_speeds_or_nodes() -> None:
    schedule = transfers(replicated(SHAPES, 2, [0]), replicated(SHAPES, 2, [0, 1]))
    found = loads(schedule)
    assert found.floor_seconds is None and found.between_nodes_bytes == 0
    assert [load.link for load in found.links] == [
        "rank 0 sends inside its node",
        "rank 1 receives inside its node",
    ]
    nothing = loads(transfers(replicated(SHAPES, 2, [0, 1]), replicated(SHAPES, 2, [1])))
    assert nothing.busiest_sender is None and nothing.links == () and nothing.bytes == 0
    assert nothing.copied_bytes == WHOLE


def test_wrong_topologies_are_refused() -> None:
    with pytest.raises(InputError, match="inside"):
        Topology({0: "a"}, inside=0.0)
    schedule = transfers(replicated(SHAPES, 2, [0]), replicated(SHAPES, 2, [1]))
    with pytest.raises(InputError, match=r"ranks \[1\]"):
        loads(schedule, {0: "a"})


def test_the_smaller_item_size_travels() -> None:
    box = full_box((10, 10))
    for there, here, moved in ((4, 2, 2), (2, 4, 2), (8, 8, 8)):
        src = {"w": TensorSpec((10, 10), there, ((0, box),))}
        dst = {"w": TensorSpec((10, 10), here, ((0, box), (1, box)))}
        schedule = transfers(src, dst)
        assert schedule.bytes == schedule.lower_bound_bytes == 100 * moved
        assert schedule.itemsizes == {"w": moved}
        audit(src, dst, schedule)


def test_masters_become_weights_with_two_bytes_an_element() -> None:
    src, dst = masters(Layout(2, 2, 1)), weights(Layout(4, 1, 1))
    schedule = transfers(src, dst, NODES)
    audit(src, dst, schedule, NODES)
    assert set(schedule.itemsizes.values()) == {2}


def test_slices_travel_in_msgpack() -> None:
    src, dst = weights(Layout(2, 2, 2)), masters(Layout(3, 2, 1), 4)
    schedule = transfers(src, dst, NODES, min_split_bytes=64)
    for rank in range(10):
        packed = msgpack.packb(to_wire(schedule.part(rank)))
        assert from_wire(msgpack.unpackb(packed)) == schedule.part(rank)


@pytest.mark.parametrize("key", ["names", "boxes", "transfers", "itemsizes", "node_bytes"])
def test_what_is_no_schedule_is_refused(key: str) -> None:
    wire = to_wire(transfers(replicated(SHAPES, 2, [0]), replicated(SHAPES, 2, [1])).part(1))
    for wrong in (
        {k: v for k, v in wire.items() if k != key},
        wire | {key: 3},
        wire | {key: [[1, 2, 3]]},
    ):
        with pytest.raises(InputError, match="this is not a schedule"):
            from_wire(wrong)
    with pytest.raises(InputError, match="leaves its"):
        from_wire(wire | {"transfers": [[7], [0], [0], [1], [0]]})


def test_a_schedule_can_be_built_by_hand() -> None:
    one = Transfer("w", ((0, 2),), 0, 1)
    schedule = transfers({"w": TensorSpec((2,), 4, ((0, ((0, 2),)),))}, replicated({"w": (2,)}, 4, [1]))
    assert list(schedule.transfers) == [one] and schedule.transfers == (one,)
    assert schedule.transfers != (replace(one, hop=1),)
    changed = replace(schedule, transfers=(one, one))
    assert changed.bytes == 16 and changed.sent_bytes == {0: 16} and changed.transfers[1:] == (one,)


def test_making_schedules_needs_no_torch() -> None:
    code = "import realflow.realloc.plan, realflow.realloc.topology, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
