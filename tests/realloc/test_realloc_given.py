"""What `transfers` is given: any sequences are accepted, everything else is said by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.errors import InputError
from realflow.realloc import Storage, TensorSpec, Topology, local_shards, replicated, to_wire, transfers
from realflow.realloc.given import uniform

TOP, BOTTOM, WHOLE = ((0, 2), (0, 3)), ((2, 4), (0, 3)), ((0, 4), (0, 3))
SRC = {"w": TensorSpec((4, 3), 4, ((0, TOP), (1, BOTTOM)))}
DST = {"w": TensorSpec((4, 3), 4, ((0, WHOLE), (1, WHOLE)))}


def loosened(value: Any, choose: Callable[[], int]) -> Any:
    """The same numbers in other sequences and other kinds of whole numbers."""
    if isinstance(value, tuple):
        made = [loosened(one, choose) for one in value]
        return made if choose() % 2 else tuple(made)
    return (int, np.int64, np.int32)[choose() % 3](value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequences_make_the_same_schedule(data: st.DataObject) -> None:
    def choose() -> int:
        return data.draw(st.integers(0, 5))

    loose = [
        {name: TensorSpec(*(loosened(part, choose) for part in (spec.shape, spec.itemsize, spec.holders)))}
        for side in (SRC, DST)
        for name, spec in side.items()
    ]
    found = transfers(*loose)
    assert found == transfers(SRC, DST)
    assert to_wire(found) == to_wire(transfers(SRC, DST))  # msgpack takes no other whole numbers than int
    assert uniform(("given", loose[0])) == [SRC]


def test_sizes_of_torch_and_storage_for_lists() -> None:
    tensor = torch.zeros(4, 3)
    spec = TensorSpec(tensor.shape, 4, [[1, [[0, 4], [0, 3]]]])
    assert transfers(SRC, {"w": spec}).bytes == 24
    assert local_shards({"w": spec}, 1, {"w": tensor})["w"][0].box == WHOLE
    with pytest.raises(InputError, match=r"^w: rank 1 holds box .* no tensor is given"):
        local_shards({"w": spec}, 1, {})
    assert isinstance(local_shards(DST, 0, {"w": tensor})["w"][0], Storage)


def test_what_is_uniform_stays_the_same_object() -> None:
    """Geometry is done once for parameters whose holders are one object."""
    holders = DST["w"].holders
    made = uniform(("given", {name: TensorSpec((4, 3), 4, holders) for name in "ab"}))[0]
    assert made["a"].holders is made["b"].holders is holders
    loose = [[0, [[0, 4], [0, 3]]]]
    made = uniform(("given", {name: TensorSpec((4, 3), 4, loose) for name in "ab"}))[0]
    assert made["a"].holders is made["b"].holders


def wrong_spec(**changed: Any) -> dict[str, TensorSpec]:
    return {"w": TensorSpec(**{"shape": (4, 3), "itemsize": 4, "holders": ((1, WHOLE),), **changed})}


WRONG = {
    "item size": (wrong_spec(itemsize=0), "item size 0 in the destination", "at least 1"),
    "item size, a fraction": (wrong_spec(itemsize=2.0), "item size 2.0", "at least 1"),
    "item size, a dtype": (
        wrong_spec(itemsize=torch.float32),
        "item size torch.float32",
        "bytes of an element",
    ),
    "rank below 0": (wrong_spec(holders=((-1, WHOLE),)), "holder 0 .* rank -1", "at least 0"),
    "rank, a text": (wrong_spec(holders=((0, TOP), ("0", BOTTOM))), "holder 1 .* rank '0'", "whole number"),
    "rank, a truth value": (wrong_spec(holders=((True, WHOLE),)), "rank True", "whole number"),
    "shape below 0": (wrong_spec(shape=(4, -3)), r"shape \(4, -3\)", "at least 0"),
    "shape, a number": (wrong_spec(shape=12), "shape 12", "whole numbers"),
    "shape, a text": (wrong_spec(shape="43"), "shape '43'", "whole numbers"),
    "box with too few dims": (wrong_spec(holders=((1, TOP[:1]),)), "rank 1 has 1 dim, ", "has 2"),
    "box with too many dims": (wrong_spec(holders=((1, (*TOP, (0, 1))),)), "rank 1 has 3 dims, ", "has 2"),
    "box of lengths": (wrong_spec(holders=((1, (4, 3)),)), r"box \(4, 3\) of .*rank 1", "one .start, stop."),
    "box, open": (wrong_spec(holders=((1, ((0, None), (0, 3))),)), "rank 1", "of whole numbers for each dim"),
    "box backwards": (wrong_spec(holders=((1, ((4, 0), (0, 3))),)), "rank 1 leaves", "start <= stop"),
    "holder, a rank": (wrong_spec(holders=(1,)), "holder 0 .* is 1", "rank, box"),
    "holders, a mapping": (wrong_spec(holders={1: WHOLE}), r"holders .* \(dict\)", "rank, box"),
    "a tuple for a spec": ({"w": ((4, 3), 4, ((1, WHOLE),))}, r"found .* \(tuple\)", "expected a TensorSpec"),
    "a tensor for a spec": ({"w": torch.zeros(4, 3)}, r"found .* \(Tensor\)", "expected a TensorSpec"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_name_and_expectation(what: str) -> None:
    dst, found, expected = WRONG[what]
    with pytest.raises(InputError, match=f"(?s){found}.*{expected}") as caught:
        transfers(SRC, dst)
    assert [problem.where for problem in caught.value.problems] == ["w"]


def test_wrong_layouts_names_and_topologies() -> None:
    with pytest.raises(InputError, match=r"the source layout: found \[\] \(list\); expected a mapping"):
        transfers([], DST)
    with pytest.raises(InputError, match=r"^1: name 1 \(int\) in the destination layout"):
        transfers(SRC, {1: DST["w"]})
    with pytest.raises(InputError, match=r"topology \['a', 'b'\]: expected a Topology"):
        transfers(SRC, DST, ["a", "b"])
    assert transfers(SRC, DST, Topology({0: "a", 1: "b"})).node_bytes == {("a", "b"): 24, ("b", "a"): 24}


def test_all_that_is_wrong_on_both_sides_is_said_at_once() -> None:
    src = {"a": TensorSpec((4, 3), 0, ((0, WHOLE), ("1", WHOLE))), "b": 3}
    with pytest.raises(InputError) as caught:
        transfers(src, wrong_spec(shape=(4, "3")))
    assert [problem.where for problem in caught.value.problems] == ["a", "a", "b", "w"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_the_bound_of_the_busiest_is_in_whole_bytes(size: int, senders: int, takers: int, each: int) -> None:
    """Replicas send to ranks that have nothing: the busiest sends the mean or more, in whole bytes."""
    src = replicated({"w": (size,)}, each, range(senders))
    dst = replicated({"w": (size,)}, each, range(senders, senders + takers))
    schedule = transfers(src, dst, min_split_bytes=1)
    assert schedule.busiest_bound_bytes == -(-size * each * takers // senders)
    assert max(schedule.sent_bytes.values()) >= schedule.busiest_bound_bytes


def test_what_one_rank_alone_can_send_is_its_bound() -> None:
    """Sixteen bytes; the bound was one too low."""
    src, dst = replicated({"w": (4,)}, 4, [0]), replicated({"w": (4,)}, 4, [1])
    assert transfers(src, dst).busiest_bound_bytes == transfers(src, dst).bytes == 16
