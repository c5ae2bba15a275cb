"""Schedules of random layouts and of all layouts of up to 8 ranks, against masks and a linear program."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedule_cases import LAYOUTS, NODES, RELATIONS, first_rank, masters, random_pair, weights
from schedule_oracle import assert_balanced, audit, least_busiest

from realflow.layout import Layout
from realflow.realloc import Schedule, Tensors, transfers
from realflow.realloc.schedule import from_wire, to_wire

quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
randoms = given(st.integers(0, 2**32 - 1), st.sampled_from([64, 512]))


@quick
@randoms
def test_random_layouts(seed: int, smallest: int) -> None:
    random_layouts(seed, smallest)


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(quick, max_examples=2000)
@randoms
def test_random_layouts_thoroughly(seed: int, smallest: int) -> None:
    random_layouts(seed, smallest)


def random_layouts(seed: int, smallest: int) -> None:
    src, dst, nodes = random_pair(Random(seed))
    schedule = transfers(src, dst, nodes, min_split_bytes=smallest)
    facts = audit(src, dst, schedule, nodes)
    assert_balanced(schedule, facts, nodes, smallest)
    assert schedule == transfers(src, dst, nodes, min_split_bytes=smallest)
    ranks = {rank for specs in (src, dst) for spec in specs.values() for rank, _ in spec.holders}
    assert_slices(schedule, sorted(ranks))


def assert_slices(schedule: Schedule, ranks: list[int]) -> None:
    """The parts of all ranks are the whole, in its order, also by way of JSON."""
    parts = {rank: from_wire(json.loads(json.dumps(to_wire(schedule.part(rank))))) for rank in ranks}
    for rank, part in parts.items():
        assert part == schedule.part(rank)
        assert list(part.transfers) == [t for t in schedule.transfers if rank in t.pair]
        assert list(part.copies) == [t for t in schedule.copies if t.source == rank]
        assert part.itemsizes.keys() == {t.name for t in (*part.transfers, *part.copies)}
        assert part.part(rank) == part


def pairs(stride: int) -> Iterator[tuple[Layout, Layout, str]]:
    """Every `stride`-th of all ordered pairs in all relations of their ranks, in a shuffled order."""
    every = list(product(LAYOUTS, LAYOUTS, RELATIONS))
    Random(3).shuffle(every)
    return iter(every[::stride])


def test_layout_pairs_slice() -> None:
    for source, destination, relation in pairs(stride=60):
        layout_pair(source, destination, relation)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_layout_pairs_all() -> None:
    for source, destination, relation in pairs(stride=1):
        layout_pair(source, destination, relation)


def layout_pair(source: Layout, destination: Layout, relation: str) -> None:
    """Weights to weights and float32 masters to weights, on nodes of 4 ranks; and nothing twice."""
    first = first_rank(relation, source, destination)
    goal = weights(destination, first)
    for start in (weights(source), masters(source)):
        schedule = transfers(start, goal, NODES, min_split_bytes=256)
        assert_balanced(schedule, audit(start, goal, schedule, NODES), NODES, 256)
    if relation == "same" and source == destination:
        assert len(transfers(weights(source), goal, NODES).transfers) == 0


def test_masters_take_weights_from_any_layout() -> None:
    """Resuming under another layout: float32 masters from float32 masters, several boxes a rank."""
    start, goal = masters(Layout(2, 2, 2)), masters(Layout(3, 1, 2), 4)
    schedule = transfers(start, goal, NODES, min_split_bytes=256)
    assert_balanced(schedule, audit(start, goal, schedule, NODES), NODES, 256)
    assert set(schedule.itemsizes.values()) == {4}


def relayed() -> tuple[Tensors, Tensors, Schedule]:
    """All of a model from one rank to all eight of two other nodes: most of it must be relayed."""
    start, goal = weights(Layout(1, 1, 1)), weights(Layout(8, 1, 1), 4)
    return start, goal, transfers(start, goal, NODES, min_split_bytes=64)


def test_a_piece_crosses_once_and_is_relayed() -> None:
    start, goal, schedule = relayed()
    whole = schedule.bytes // 8
    assert schedule.node_bytes == {("n0", "n1"): whole, ("n0", "n2"): whole}
    assert {t.hop for t in schedule.transfers} == {0, 1}
    # Four ranks share the relaying of 3 copies, so that each sends 3/4 of the model.
    sent = {rank: size for rank, size in schedule.sent_bytes.items() if rank >= 4}
    assert len(sent) == 8
    assert max(sent.values()) <= 3 / 4 * whole + 64
    assert_balanced(schedule, audit(start, goal, schedule, NODES), NODES, 64)


def test_the_audit_notices_what_is_wrong() -> None:
    start, goal, schedule = relayed()
    one = next(t for t in schedule.transfers if t.hop == 1)
    arrival = next(t for t in schedule.transfers if t.destination == one.source)
    other = next(r for r in range(4, 8) if r not in one.pair)
    rest = [t for t in schedule.transfers if t != one]
    wrong = {
        "dropped": rest,
        "twice": [*schedule.transfers, one],
        "relayed by a rank that got something else": [*rest, replace(one, source=other)],
        "across nodes": [*rest, replace(one, source=0, hop=0)],
        "not relayed but invented": [*rest, replace(one, hop=0)],
        "never arrived": [t for t in schedule.transfers if t != arrival],
    }
    for what, transfers_then in wrong.items():
        with pytest.raises(AssertionError):
            audit(start, goal, replace(schedule, transfers=tuple(transfers_then)), NODES)
            pytest.fail(what)


def test_the_program_notices_one_busy_sender() -> None:
    start, goal = weights(Layout(4, 1, 1)), weights(Layout(4, 1, 1), 8)
    schedule = transfers(start, goal, min_split_bytes=256)
    facts = audit(start, goal, schedule)
    assert_balanced(schedule, facts, None, 256)
    assert least_busiest(facts) == pytest.approx(facts.lacking / 4)
    lazy = replace(schedule, transfers=tuple(replace(t, source=0) for t in schedule.transfers))
    with pytest.raises(AssertionError):
        assert_balanced(lazy, audit(start, goal, lazy), None, 256)
