"""Schedules of a plan's edges, and the slices that ranks get of them."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from scenes import grpo, place
from tiny import tiny_model

from planner import read_cluster
from realflow.errors import InputError, RunError
from realflow.graph.types import Follow
from realflow.layout import Box, box_size, intersect
from realflow.models.card import Card, card
from realflow.models.partition import partition
from realflow.planfile import Cluster, Node, Plan
from realflow.planfile.holdings import Holding, follow_edges, holdings, planned_edges
from realflow.realloc.edges import edge_schedule, specs, topology
from realflow.realloc.schedule import from_wire
from realflow.realloc.topology import loads
from realflow.runtime.messages import decode, encode
from realflow.runtime.slices import Slices, edge_slices

PAIRS = [
    ({}, {"rollout": "d2t2", "train": "d2p2"}),
    ({"rollout": (0, 1), "train": (2, 3)}, {"rollout": "t2", "train": "p2"}),
    ({"rollout": (0, 1), "train": (1, 2)}, {"rollout": "d2", "train": "t2"}),
    ({"train": (0,)}, {"rollout": "p2t2"}),
]


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Card]:
    found = card(tiny_model(tmp_path_factory.mktemp("edges") / "model"))
    return {"actor": found, "ref": found}


@pytest.mark.parametrize(("ranks", "layouts"), PAIRS)
def test_an_edge_brings_every_rank_the_boxes_of_its_call(
    cards: dict[str, Card], ranks: dict, layouts: dict
) -> None:
    plan = place(grpo(), 4, ranks, layouts)
    (edge,) = planned_edges(plan.graph, plan.calls)
    schedule = edge_schedule(plan, edge, cards)
    assert schedule.bytes == schedule.lower_bound_bytes > 0
    arrived: dict[tuple[int, str], list[Box]] = defaultdict(list)
    for transfer in (*schedule.transfers, *schedule.copies):
        arrived[transfer.destination, transfer.name].append(transfer.box)
    where = plan.calls["rollout"]
    cut = partition(cards["actor"], where.layout)
    needed = {rank: cut.boxes(held.pp, held.tp) for rank, held in holdings(where).items()}
    for rank, held in edge.destinations:
        assert held == holdings(where)[rank]
        for name, box in needed[rank].items():
            parts = arrived.pop((rank, name))
            assert all(intersect(part, box) == part for part in parts)
            assert sum(map(box_size, parts)) == box_size(box)
            apart = not any(intersect(a, b) for i, a in enumerate(parts) for b in parts[:i])
            assert apart, "written twice"
    assert not arrived, "ranks got what they did not need"


def test_a_follower_under_two_layouts_on_one_rank_can_be_filled(cards: dict[str, Card]) -> None:
    """Norms are whole on every tensor rank, so that the two holdings of rank 0 overlap."""
    graph = grpo(probe="ref")
    ref = replace(graph.models["ref"], follows=Follow("actor", 0.9))
    graph = replace(graph, models={**graph.models, "ref": ref})
    plan = place(graph, 3, {"train": (2,), "ref": (0, 1), "probe": (0, 1)}, {"ref": "t2", "probe": "p2"})
    edges = follow_edges(graph, plan.calls)
    for edge in edges:
        schedule = edge_schedule(plan, edge, cards)
        assert schedule.bytes == schedule.lower_bound_bytes > 0
    together = replace(edges[0], destinations=(*edges[0].destinations, *edges[1].destinations))
    with pytest.raises(InputError, match="overlap"):
        edge_schedule(plan, together, cards)


def test_a_rank_may_be_a_source_with_several_holdings(cards: dict[str, Card]) -> None:
    graph = grpo(second=1)
    plan = place(graph, 2, {"rollout": (1,)}, {"greedy": "t2", "train": "p2"})
    edge = planned_edges(graph, plan.calls)[-1]
    assert edge.call == "rollout"
    assert [held for rank, held in edge.sources if rank == 1] == [Holding(0, 1, 1, 2), Holding(1, 2, 0, 1)]
    source = specs(cards["actor"], graph.models["actor"], edge.sources)
    assert max(len([r for r, _ in spec.holders if r == 1]) for spec in source.values()) == 2
    schedule = edge_schedule(plan, edge, cards)
    whole = cards["actor"].weight_bytes(graph.models["actor"].dtype)
    assert schedule.bytes == schedule.lower_bound_bytes < whole / 2, "it has more than half of it"


def test_heads_and_dtypes_of_models_count(cards: dict[str, Card]) -> None:
    plan = place(grpo(), 2, {"rollout": (0,), "train": (1,)})
    (edge,) = planned_edges(plan.graph, plan.calls)
    sizes = {}
    for dtype, head in (("bfloat16", "lm"), ("float32", "lm"), ("float32", "value")):
        spec = replace(plan.graph.models["actor"], dtype=dtype, head=head)
        other = replace(plan, graph=replace(plan.graph, models={**plan.graph.models, "actor": spec}))
        schedule = edge_schedule(other, edge, cards)
        sizes[dtype, head] = schedule.bytes
        assert ("score.weight" in schedule.itemsizes) == (head == "value")
    assert sizes["float32", "lm"] == 2 * sizes["bfloat16", "lm"]


def test_slices_survive_the_wire_and_say_which_holdings_take_part(cards: dict[str, Card]) -> None:
    plan = place(grpo(), 4, {"rollout": (0, 1), "train": (1, 2)}, {"rollout": "t2", "train": "p2"})
    (edge,) = planned_edges(plan.graph, plan.calls)
    slices = edge_slices(plan, edge, cards)
    assert set(slices) == {0, 1, 2}
    assert {rank: (s.read, s.write) for rank, s in slices.items()} == {
        0: ([], [[0, 1, 0, 2]]),
        1: ([[0, 2, 0, 1]], [[0, 1, 1, 2]]),
        2: ([[1, 2, 0, 1]], []),
    }
    whole = edge_schedule(plan, edge, cards)
    for rank, message in slices.items():
        back = decode(encode(message))
        assert back == message
        assert from_wire(back.part) == whole.part(rank)  # type: ignore[union-attr]
    floor = loads(whole, topology(plan.cluster)).floor_seconds
    assert floor
    assert all(message.floor_seconds == floor for message in slices.values())
    assert len(msgpack.packb(slices[1].part)) < 20_000


def test_links_are_as_fast_as_the_cluster_says(cards: dict[str, Card], tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "nodes:\n"
        "  - {name: a, devices: 1, kind: cuda, inside: 300 GB/s}\n"
        "  - {name: b, devices: 1, kind: cuda, inside: 200000 MB/s, between: 25 GB/s}\n"
    )
    cluster = read_cluster(path)
    assert [(node.inside, node.between) for node in cluster.nodes] == [(300e9, None), (200e9, 25e9)]
    found = topology(cluster)
    assert [found.speed("inside", node) for node in "ab"] == [300e9, 200e9]
    assert [found.speed("between_rank", node) for node in "ab"] == [50e9, 25e9], "assumed, and given"
    assert found.nodes == {0: "a", 1: "b"}
    plan = replace(place(grpo(), 2, {"rollout": (0,), "train": (1,)}), cluster=cluster)
    (edge,) = planned_edges(plan.graph, plan.calls)
    schedule = edge_schedule(plan, edge, cards)
    links = {load.link: load.seconds for load in loads(schedule, found).links}
    assert links["rank 1 sends to other nodes"] == schedule.bytes / 25e9
    assert links["rank 0 receives from other nodes"] == schedule.bytes / 50e9
    assert loads(schedule, found).floor_seconds == schedule.bytes / 25e9, "its own node's, not the slowest"
    quick = replace(plan, cluster=Cluster((*cluster.nodes, Node("c", 1, "cpu", between=1e6))))
    assert loads(edge_schedule(quick, edge, cards), topology(quick.cluster)).floor_seconds == (
        schedule.bytes / 25e9
    ), "a slow node that takes no part"
    path.write_text("nodes:\n  - {name: a, devices: 1, between: fast}\n")
    with pytest.raises(InputError, match="bytes a second, such as 50 GB/s"):
        read_cluster(path)


def wait(slices: Slices, seconds: float = 60.0) -> dict:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = slices.take()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("no slices came")


def test_an_edge_is_made_once_and_in_a_thread(cards: dict[str, Card]) -> None:
    plan = place(grpo(), 2, {"rollout": (0,), "train": (1,)})
    edges = planned_edges(plan.graph, plan.calls)
    slices = Slices(plan, cards)
    slices.prepare(edges)
    slices.prepare(edges)
    assert {rank: len(parts) for rank, parts in wait(slices).items()} == {0: 1, 1: 1}
    slices.prepare(edges)
    assert slices.take() == {}
    slices.close()


def test_a_schedule_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    plan: Plan = place(grpo(), 2, {"rollout": (0,), "train": (1,)})
    slices = Slices(plan, {})
    slices.prepare(planned_edges(plan.graph, plan.calls))
    with pytest.raises(RunError, match=r"schedule of the reallocation actor-actor-.*could not be made"):
        wait(slices)
    slices.close()
