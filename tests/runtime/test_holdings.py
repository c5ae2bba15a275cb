"""Holdings: what calls share, and which moves follow from what they do not share."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import grpo, place

from realflow.graph.types import Follow, Graph
from realflow.layout import Layout
from realflow.planfile import CallPlan
from realflow.planfile.holdings import (
    Edge,
    Freshness,
    Holding,
    follow_edges,
    held_by,
    holdings,
    planned_edges,
    put_away,
    users,
)

WORLD = 8
AFTER = ("keep", "offload", "free")


@st.composite
def where(draw: st.DrawFn, after: tuple[str, ...] = ("keep",)) -> CallPlan:
    """A call of any layout on any ranks of eight."""
    sizes = [draw(st.sampled_from((1, 1, 2, 3))) for _ in range(3)]
    while sizes[0] * sizes[1] * sizes[2] > WORLD:
        sizes[sizes.index(max(sizes))] = 1
    layout = Layout(*sizes)
    ranks = sorted(draw(st.permutations(range(WORLD)))[: layout.size])
    return CallPlan(tuple(ranks), layout, "native", after=draw(st.sampled_from(after)))


def scene(graph: Graph, given_calls: dict[str, CallPlan]) -> dict[str, CallPlan]:
    return {**place(graph, 1, {}).calls, **given_calls}


@given(where())
def test_a_holding_is_a_ranks_place_in_the_mesh(call: CallPlan) -> None:
    found = holdings(call)
    assert tuple(found) == call.ranks
    layout = call.layout
    everything = {Holding(p, layout.pp, t, layout.tp) for p in range(layout.pp) for t in range(layout.tp)}
    assert set(found.values()) == everything
    for held in everything:
        assert sum(held == other for other in found.values()) == layout.dp


@given(where(), where(), where())
def test_calls_share_storage_where_their_holdings_are_equal(a: CallPlan, b: CallPlan, c: CallPlan) -> None:
    graph = grpo(second=1)
    calls = scene(graph, {"rollout": a, "greedy": b, "train": c})
    found = users(graph, calls, "actor")
    for name, call in (("rollout", a), ("greedy", b), ("train", c)):
        for rank, held in holdings(call).items():
            assert name in {user.name for user in found[rank, held]}
    assert sum(map(len, found.values())) == a.layout.size + b.layout.size + c.layout.size


@given(where(AFTER), where(AFTER), where(("keep", "offload")))
def test_weights_are_put_away_where_every_user_says_so(a: CallPlan, b: CallPlan, c: CallPlan) -> None:
    graph = grpo(second=1)
    calls = scene(graph, {"rollout": a, "greedy": b, "train": c})
    for held, after in put_away(graph, calls, "actor").items():
        said = {calls[call.name].after for call in users(graph, calls, "actor")[held]}
        assert (after == "keep") == ("keep" in said)
        assert (after == "free") == (said == {"free"})


@given(where(), where(), where())
def test_edges_bring_every_call_what_it_lacks(a: CallPlan, b: CallPlan, train: CallPlan) -> None:
    graph = grpo(second=1)
    calls = scene(graph, {"rollout": a, "greedy": b, "train": train})
    edges = planned_edges(graph, calls)
    have = set(held_by(train))
    for name in ("greedy", "rollout"):  # in the graph's order
        lacking = held_by(calls[name]) - have
        assert [set(e.destinations) for e in edges if e.call == name] == ([lacking] if lacking else [])
        assert all(set(e.sources) == have for e in edges if e.call == name)
        have |= lacking
    for edge in edges:
        assert not set(edge.sources) & set(edge.destinations)
        assert edge.ranks == tuple(sorted({rank for rank, _ in edge.sources + edge.destinations}))


@given(where(("keep", "free")), where(("keep", "free")), where())
def test_what_is_freed_is_brought_again(a: CallPlan, b: CallPlan, train: CallPlan) -> None:
    graph = grpo(second=1)
    calls = scene(graph, {"rollout": a, "greedy": b, "train": train})
    away = put_away(graph, calls, "actor")
    weights = Freshness(graph, calls, "actor")
    assert weights.edge("rollout") is None, "everything was loaded"
    for name in ("greedy", "rollout", "greedy"):
        edge = weights.edge(name)
        if edge is not None:
            weights.moved(edge)
        assert weights.edge(name) is None
        weights.used(name)
        assert not any(away[held] == "free" for held in weights.fresh & held_by(calls[name]))
        assert held_by(train) <= weights.fresh
    weights.used("train")
    assert weights.fresh == held_by(train)


def test_a_periodic_call_saves_the_move_only_where_it_always_runs_before() -> None:
    whole, apart = CallPlan((0,), Layout(), "native"), CallPlan((1,), Layout(), "native")
    for every, expected in ((1, ["greedy"]), (2, ["greedy", "rollout"])):
        graph = grpo(second=every)
        calls = scene(graph, {"rollout": apart, "greedy": apart, "train": whole})
        assert [edge.call for edge in planned_edges(graph, calls)] == expected


@settings(deadline=None)
@given(where(), where(), where())
def test_a_follower_gets_every_holding_once_and_a_rank_one_at_a_time(
    a: CallPlan, b: CallPlan, train: CallPlan
) -> None:
    graph = grpo(probe="ref")
    ref = replace(graph.models["ref"], follows=Follow("actor", 0.9))
    graph = replace(graph, models={**graph.models, "ref": ref})
    calls = scene(graph, {"ref": a, "probe": b, "train": train})
    edges = follow_edges(graph, calls)
    for edge in edges:
        ranks = [rank for rank, _ in edge.destinations]
        assert ranks == sorted(set(ranks)), "a rank's holdings overlap"
        assert set(edge.sources) == held_by(train)
    filled = [held for edge in edges for held in edge.destinations]
    assert sorted(filled) == sorted(held_by(a) | held_by(b))
    assert len(filled) == len(set(filled))
    both = [rank for rank, held in held_by(a) if holdings(b).get(rank, held) != held]
    assert [edge.turn for edge in edges] == ([0, 1] if both else [0])
    assert len({edge.key for edge in edges}) == len(edges)


def test_the_key_tells_edges_apart_by_holdings_alone() -> None:
    one = Edge(
        "actor", "rollout", ((0, Holding()),), ((1, Holding(0, 1, 0, 2)), (2, Holding(0, 1, 1, 2))), "actor"
    )
    assert one.key == replace(one, call="greedy").key
    others = [replace(one, sources=((3, Holding()),)), replace(one, into="ref"), replace(one, model="critic")]
    assert len({one.key, *(other.key for other in others)}) == 4
    assert str(Holding(1, 2, 0, 2)) == "p1/2 t0/2"
    assert str(Holding()) == "whole"
