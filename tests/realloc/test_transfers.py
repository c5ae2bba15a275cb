"""Schedules against an independent, element-by-element model of what must happen."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realflow.errors import InputError
from realflow.layout import Box, box_size, cut, flat_boxes, full_box, lengths, without
from realflow.realloc import Schedule, Tensors, TensorSpec, replicated, transfers
from realflow.realloc.balance import Class, level
from realflow.realloc.messages import messages

RANKS = 6
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def elements(box: Box) -> set[tuple[int, ...]]:
    """Every index of a box; `()` has one."""
    return set(product(*(range(start, stop) for start, stop in box)))


def check(src: Tensors, dst: Tensors, schedule: Schedule) -> None:
    """Exactly once, from a holder, nothing needless: counted element by element."""
    written: Counter[tuple[str, int, tuple[int, ...]]] = Counter()
    for item in (*schedule.transfers, *schedule.copies):
        storage = dst if item.hop else src
        inside_source = [
            b for r, b in storage[item.name].holders if r == item.source and elements(item.box) <= elements(b)
        ]
        inside_destination = [
            b
            for r, b in dst[item.name].holders
            if r == item.destination and elements(item.box) <= elements(b)
        ]
        assert inside_source and inside_destination
        written.update((item.name, item.destination, index) for index in elements(item.box))
    needed = {
        (name, rank, index)
        for name, spec in dst.items()
        for rank, box in spec.holders
        for index in elements(box)
    }
    assert set(written) == needed
    assert set(written.values()) <= {1}
    held = {
        (name, rank, index)
        for name, spec in src.items()
        for rank, box in spec.holders
        for index in elements(box)
    }
    lacking = sum(dst[name].itemsize for name, rank, index in needed if (name, rank, index) not in held)
    assert schedule.bytes == schedule.lower_bound_bytes == lacking
    assert all(t.source != t.destination for t in schedule.transfers)
    assert all(t.source == t.destination for t in schedule.copies)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """Any box inside a shape, empty ones included."""
    found = []
    for size in shape:
        start = draw(st.integers(0, size))
        found.append((start, draw(st.integers(start, size))))
    return tuple(found)


@st.composite
def partition(draw: st.DrawFn, box: Box, depth: int = 3) -> list[Box]:
    """A box cut at random places into boxes that do not overlap."""
    dims = [dim for dim, (start, stop) in enumerate(box) if stop - start > 1]
    if depth == 0 or not dims or draw(st.booleans()):
        return [box]
    dim = draw(st.sampled_from(dims))
    start, stop = box[dim]
    middle = draw(st.integers(start + 1, stop - 1))
    low = (*box[:dim], (start, middle), *box[dim + 1 :])
    high = (*box[:dim], (middle, stop), *box[dim + 1 :])
    return [*draw(partition(low, depth - 1)), *draw(partition(high, depth - 1))]


@settings(quick, max_examples=200)
@given(st.data(), st.lists(st.integers(0, 5), max_size=3))
def test_what_boxes_leave_of_a_box(data: st.DataObject, shape: list[int]) -> None:
    """Every element that no other box has, once; two boxes for each dim at most where there is one."""
    box = data.draw(boxes(tuple(shape)))
    others = data.draw(st.lists(boxes(tuple(shape)), max_size=4))
    left = without(box, others)
    assert set().union(*map(elements, left)) == elements(box).difference(*map(elements, others))
    assert sum(map(box_size, left)) == len(set().union(*map(elements, left)))
    assert all(0 not in lengths(part) for part in left)
    assert all(len(without(box, [other])) <= 2 * len(box) or not box for other in others)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensors, Tensors]:
    """Two layouts: the source covers each tensor and holds odd boxes beside; the destination holds any."""
    src: dict[str, TensorSpec] = {}
    dst: dict[str, TensorSpec] = {}
    for name in draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        itemsize = draw(st.sampled_from([1, 2, 8]))
        ranks = st.integers(0, RANKS - 1)
        held = [(draw(ranks), box) for box in draw(partition(full_box(shape)))]
        held += draw(st.lists(st.tuples(ranks, boxes(shape)), max_size=4))
        wanted = [
            (rank, box)
            for rank in draw(st.lists(ranks, max_size=4, unique=True))
            for box in draw(st.one_of(boxes(shape).map(lambda b: [b]), partition(draw(boxes(shape)))))
        ]
        src[name] = TensorSpec(shape, itemsize, tuple(held))
        dst[name] = TensorSpec(shape, itemsize, tuple(wanted))
    return src, dst


routes = given(
    pairs(), st.one_of(st.none(), st.lists(st.sampled_from("xyz"), min_size=RANKS, max_size=RANKS))
)


@quick
@routes
def test_every_missing_element_is_written_once(
    pair: tuple[Tensors, Tensors], nodes: list[str] | None
) -> None:
    written_once(pair, nodes)


@pytest.mark.full
@settings(quick, max_examples=2000)
@routes
def test_every_missing_element_is_written_once_thoroughly(
    pair: tuple[Tensors, Tensors], nodes: list[str] | None
) -> None:
    written_once(pair, nodes)


def written_once(pair: tuple[Tensors, Tensors], nodes: list[str] | None) -> None:
    src, dst = pair
    topology = None if nodes is None else dict(enumerate(nodes))
    schedule = transfers(src, dst, topology, min_split_bytes=1)
    check(src, dst, schedule)
    assert schedule == transfers(src, dst, topology, min_split_bytes=1)


def test_the_check_notices_a_dropped_transfer() -> None:
    src, dst = replicated({"w": (4, 4)}, 2, [0, 1]), replicated({"w": (4, 4)}, 2, [2, 3])
    schedule = transfers(src, dst)
    check(src, dst, schedule)
    with pytest.raises(AssertionError):
        check(src, dst, replace(schedule, transfers=schedule.transfers[1:]))
    with pytest.raises(AssertionError):
        check(src, dst, replace(schedule, transfers=(*schedule.transfers, schedule.transfers[0])))


@quick
@given(pairs(), st.integers(8, 64))
def test_messages_carry_the_transfers_in_bounded_pieces(pair: tuple[Tensors, Tensors], limit: int) -> None:
    src, dst = pair
    schedule = transfers(src, dst)
    found = messages(schedule, limit)
    assert all(0 < message.bytes <= limit for message in found)
    assert len({message.order for message in found}) == len(found)
    sent = Counter(
        (message.source, message.destination, name, index)
        for message in found
        for name, box in message.pieces
        for index in elements(box)
    )
    assert sent == Counter(
        (t.source, t.destination, t.name, i) for t in schedule.transfers for i in elements(t.box)
    )
    for rank in range(RANKS):
        mine = [message for message in found if rank in (message.source, message.destination)]
        assert messages(schedule.part(rank), limit) == mine


@quick
@given(
    st.dictionaries(
        st.lists(st.integers(0, 4), min_size=1, unique=True).map(lambda s: tuple(sorted(s))),
        st.integers(1, 100),
    )
)
def test_the_level_is_the_least_possible(totals: dict[tuple[int, ...], int]) -> None:
    levels = level([Class(senders, total) for senders, total in totals.items()])
    loads: dict[int, float] = defaultdict(float)
    for (senders, total), quota in zip(totals.items(), levels.quotas, strict=True):
        assert len(quota) == len(senders)
        assert quota.min() >= 0
        assert sum(quota) == pytest.approx(total)
        for sender, amount in zip(senders, quota, strict=True):
            loads[sender] += amount
    # By the max-flow min-cut theorem: what only the ranks of a set can send, shared over that set.
    bound = 0.0
    for mask in range(1, 32):
        chosen = {rank for rank in range(5) if mask >> rank & 1}
        bound = max(bound, sum(t for s, t in totals.items() if set(s) <= chosen) / len(chosen))
    assert levels.bound <= bound * (1 + 1e-9)
    assert max(loads.values(), default=0.0) <= 1.002 * levels.bound


def mesh_specs(shapes: dict[str, tuple[int, ...]], ranks: range, d: int, t: int) -> dict[str, TensorSpec]:
    """Data x tensor: dim 0 of each tensor is cut over t."""
    return {
        name: TensorSpec(
            shape,
            2,
            tuple(
                (ranks[i * t + j], (cut(shape[0], t, j), *full_box(shape[1:])))
                for i in range(d)
                for j in range(t)
            ),
        )
        for name, shape in shapes.items()
    }


SHAPES = {"embed": (49152, 576), "norm": (576,), **{f"layer{i}": (1536, 576) for i in range(20)}}


def test_nothing_moves_where_nothing_is_missing() -> None:
    specs = replicated(SHAPES, 2, range(4))
    schedule = transfers(specs, replicated(SHAPES, 2, [1, 3]))
    assert schedule.transfers == () and schedule.bytes == 0
    assert {copy.source for copy in schedule.copies} == {1, 3}


def test_replicas_share_the_sending() -> None:
    src = replicated(SHAPES, 2, [0, 1, 2])
    dst = replicated(SHAPES, 2, [3, 4])
    schedule = transfers(src, dst)
    total = 2 * 2 * sum(49152 * 576 if n == "embed" else 576 if n == "norm" else 1536 * 576 for n in SHAPES)
    assert schedule.bytes == schedule.lower_bound_bytes == total
    assert schedule.busiest_bound_bytes == pytest.approx(total / 3, rel=1e-3)
    assert max(schedule.sent_bytes.values()) <= 1.001 * total / 3 + 65536
    assert len(schedule.transfers) <= 2 * len(SHAPES) + 2  # at most one cut between two senders


def test_forced_senders_are_spared_elsewhere() -> None:
    src = {
        "forced": TensorSpec((100, 1000), 4, ((0, full_box((100, 1000))),)),
        "free": TensorSpec((100, 1000), 4, ((0, full_box((100, 1000))), (1, full_box((100, 1000))))),
    }
    dst = {name: TensorSpec((100, 1000), 4, ((2, full_box((100, 1000))),)) for name in src}
    assert transfers(src, dst).sent_bytes == {0: 400_000, 1: 400_000}


def test_senders_in_the_node_are_preferred() -> None:
    topology = {0: "a", 1: "b", 2: "a", 3: "b", 4: "c"}
    schedule = transfers(replicated(SHAPES, 2, [0, 1]), replicated(SHAPES, 2, [2, 3, 4]), topology)
    inside = {(t.source, t.destination) for t in schedule.transfers if t.destination != 4}
    assert inside == {(0, 2), (1, 3)}


@pytest.mark.parametrize("src_shape", [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("dst_shape", [(1, 3), (3, 1), (2, 3)])
def test_layouts_of_different_sizes(src_shape: tuple[int, int], dst_shape: tuple[int, int]) -> None:
    shapes = {"w": (10, 3), "b": (7,)}
    src = mesh_specs(shapes, range(4), *src_shape)
    dst = mesh_specs(shapes, range(2, 8), *dst_shape)
    check(src, dst, transfers(src, dst, min_split_bytes=1))


def test_flat_optimizer_shards_are_boxes_like_any_other() -> None:
    shape = (7, 5, 3)
    shards = [(rank, box) for rank in range(4) for box in flat_boxes(shape, *cut(105, 4, rank))]
    src = {"w": TensorSpec(shape, 4, tuple(shards))}
    check(src, replicated({"w": shape}, 4, [0, 5]), transfers(src, replicated({"w": shape}, 4, [0, 5])))


def test_wrong_input_is_reported_all_at_once() -> None:
    box = full_box((4, 4))
    src = {"a": TensorSpec((4, 4), 2, ((0, ((0, 2), (0, 4))),)), "b": TensorSpec((4, 4), 2, ((0, box),))}
    dst = {
        "a": TensorSpec((4, 5), 2, ((1, box),)),
        "b": TensorSpec((4, 4), 2, ((1, ((0, 4), (0, 9))),)),
        "c": TensorSpec((4, 4), 2, ((1, box),)),
    }
    with pytest.raises(InputError) as caught:
        transfers(src, dst)
    assert [problem.where for problem in caught.value.problems] == ["a", "c", "b"]
    with pytest.raises(InputError, match="no rank of the source layout holds"):
        transfers({"a": src["a"]}, {"a": TensorSpec((4, 4), 2, ((1, box),))})
    with pytest.raises(InputError, match="overlap"):
        transfers({"b": src["b"]}, {"b": TensorSpec((4, 4), 2, ((1, box), (1, ((0, 1), (0, 1)))))})
    with pytest.raises(InputError, match=r"ranks \[1\]"):
        transfers({"b": src["b"]}, {"b": TensorSpec((4, 4), 2, ((1, box),))}, {0: "a"})
