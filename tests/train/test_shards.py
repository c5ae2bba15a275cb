"""Who owns which elements of gradients and masters; buckets that are reduced beside backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from realflow.engines.gradients import Gradients
from realflow.engines.norms import square_sum
from realflow.engines.shards import Arrangement, arrange
from realflow.models.causal import CausalModel, load_model
from realflow.models.flat import slots_of


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[Arrangement, int, dict[str, str]]:
    """An arrangement, the elements of its compute buffer, and the region of each parameter."""
    count = draw(st.integers(1, 12))
    shapes = {}
    for index in range(count):
        stem = draw(st.sampled_from(["norm", "attn.q_proj", "attn.k_proj", "mlp.up_proj"]))
        shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=2)))
        shapes[f"layers.{index}.{stem}.weight"] = shape
    slots, total = slots_of(shapes)
    region = {name: draw(st.sampled_from(["tied", "partial", "whole", "other"])) for name in slots}
    named = {kind: [name for name in slots if region[name] == kind] for kind in ("tied", "partial", "whole")}
    parts, bucket = draw(st.integers(1, 9)), draw(st.sampled_from([64, 500, 10**6]))
    return arrange(slots, parts, bucket=bucket, **named), total, region


@settings(deadline=None)
@given(arrangements())
def test_every_element_is_owned_by_one_rank(drawn) -> None:
    arrangement, total, region = drawn
    owners, order_of = torch.full((total,), -1), torch.full((total,), -1)
    for rank in range(arrangement.parts):
        for run in arrangement.owned(rank):
            span = slice(run.flat, run.flat + run.size)
            assert (owners[span] == -1).all(), "an element with two owners"
            owners[span] = rank
            order_of[span] = torch.arange(run.order, run.order + run.size)
    for name, slot in arrangement.slots.items():
        span = slice(slot.offset, slot.offset + slot.size)
        assert (owners[span] >= 0).all(), f"{name} has no owner"
        place = arrangement.places[name]
        assert torch.equal(order_of[span], torch.arange(place, place + slot.size))
        bounds = {
            "tied": (0, arrangement.tied),
            "partial": (arrangement.tied, arrangement.partial),
            "whole": (arrangement.partial, arrangement.whole),
            "other": (arrangement.whole, arrangement.total),
        }
        low, high = bounds[region[name]]
        assert low <= place and place + slot.size <= high


@settings(deadline=None)
@given(arrangements())
def test_buckets_follow_each_other_and_divide(drawn) -> None:
    arrangement, _, _ = drawn
    here = 0
    for start, stop in arrangement.buckets:
        assert start == here and (stop - start) % arrangement.parts == 0 and stop > start
        here = stop
    assert here == arrangement.total
    for edge in (arrangement.tied, arrangement.partial, arrangement.whole):
        assert not any(start < edge < stop for start, stop in arrangement.buckets), "a bucket in two regions"


@settings(deadline=None)
@given(arrangements(), st.data())
def test_what_lies_in_a_range_is_found_without_a_scan(drawn, data) -> None:
    arrangement, _, _ = drawn
    start = data.draw(st.integers(0, arrangement.total))
    stop = data.draw(st.integers(start, arrangement.total))
    runs, pieces = [], []
    for order, flat, size in arrangement.runs:
        low, high = max(start, order), min(stop, order + size)
        runs += [(low, flat + low - order, high - low)] if low < high else []
    for name, place in arrangement.places.items():
        low, high = max(start, place), min(stop, place + arrangement.slots[name].size)
        pieces += [(name, low - place, high - place, low)] if low < high else []
    assert list(arrangement.within(start, stop)) == runs
    assert sorted(arrangement.names(start, stop)) == sorted(pieces)


class Watched(tuple):
    """A tuple that counts how many of its entries are read."""

    read = 0

    def __getitem__(self, index):
        type(self).read += 1
        return super().__getitem__(index)

    def __iter__(self):
        type(self).read += len(self)
        return super().__iter__()


def test_a_bucket_costs_its_own_runs_alone() -> None:
    shapes = {f"layers.{index}.norm.weight": (64,) for index in range(1000)}
    slots, _ = slots_of(shapes)
    arrangement = arrange(slots, 2, whole=list(slots), bucket=640)
    watched = replace(arrangement, runs=Watched(arrangement.runs))
    watched.owned(0)
    Watched.read = 0
    owned = watched.owned(0)
    assert Watched.read == len(owned) == 500
    Watched.read = 0
    list(watched.runs)
    assert Watched.read == 1000, "the control"


@settings(deadline=None)
@given(st.lists(st.integers(1, 9000), max_size=6), st.sampled_from([torch.float32, torch.float64]))
def test_sums_of_squares_reach_the_host_once(sizes, dtype) -> None:
    tensors = [
        torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(size)) for size in sizes
    ]
    with Fetches() as seen:
        found = square_sum(iter(tensors))
    assert seen.count == bool(sizes)
    assert found == pytest.approx(sum(float(t.double().square().sum()) for t in tensors), rel=1e-5)


class Fetches(TorchDispatchMode):
    """Counts the numbers that go to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@settings(deadline=None)
@given(st.integers(1, 9), st.sampled_from([64, 500, 10**6]), st.integers(1, 60), st.integers(1, 60))
def test_ranks_that_hold_a_parameter_alike_divide_it_alike(parts, bucket, one, other) -> None:
    """Tensor ranks with parts of different sizes: what both hold whole has the same owners."""
    arranged = []
    for size in (one, other):
        slots, _ = slots_of(
            {"a.weight": (size, 7), "norm.weight": (33,), "k.weight": (9, 5), "b.weight": (size,)}
        )
        arranged.append(arrange(slots, parts, partial=["k.weight"], whole=["norm.weight"], bucket=bucket))
    for name in ("norm.weight", "k.weight"):
        found = []
        for arrangement in arranged:
            pieces = [
                (piece.first, piece.last, rank)
                for rank in range(parts)
                for run in arrangement.owned(rank)
                for piece in arrangement.names(run.order, run.order + run.size)
                if piece.name == name
            ]
            found.append(sorted(pieces))
        assert found[0] == found[1]


# ---------------------------------------------------------------- buckets beside backward


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    path = tiny_model(tmp_path_factory.mktemp("model"), dtype="float64", tied=False, num_hidden_layers=4)
    return load_model(path, dtype="float64")


def backward(model: CausalModel) -> None:
    tokens = torch.arange(10, 30)
    states = model.run(model.prepare(tokens, torch.arange(20), torch.tensor([0, 20], dtype=torch.int32)))
    model.head(states).square().sum().backward()


def test_buckets_are_ready_during_the_last_backward_and_in_order(model: CausalModel) -> None:
    parameters = dict(model.module.named_parameters())
    arrangement = arrange(model.flat.slots, 2, bucket=2000)
    gradients = Gradients(parameters, arrangement, torch.float64)
    ready: list[tuple[int, bool]] = []  # where it starts; whether backward had come to the first layer
    reached = [False]
    watch = model.module.get_submodule("model.layers.0.mlp.down_proj").weight.register_hook(
        lambda gradient: reached.__setitem__(0, True)
    )
    try:
        gradients.begin(lambda data: ready.append((data.storage_offset(), reached[0])))
        backward(model)
        assert ready == [], "no bucket is complete before the last micro-batch"
        reached[0] = False
        gradients.last()
        backward(model)
        assert len(ready) >= len(arrangement.buckets) - 1
        early = [start for start, late in ready if not late]
        assert len(early) >= len(arrangement.buckets) // 2, "no reduction runs beside backward"
        gradients.finish()
        starts = [start for start, _ in ready]
        assert starts == sorted((start for start, _ in arrangement.buckets), reverse=True)
        twice = {name: gradients.data[place:].clone() for name, place in arrangement.places.items()}
        gradients.begin(lambda data: None)
        backward(model)
        gradients.finish()
        for name, place in arrangement.places.items():
            size = arrangement.slots[name].size
            torch.testing.assert_close(twice[name][:size], 2 * gradients.data[place : place + size])
    finally:
        watch.remove()
        gradients.close()


def test_pending_weights_hold_back_their_buckets_alone(model: CausalModel) -> None:
    """A zero-bubble schedule: only the deferred weights still come."""
    parameters = dict(model.module.named_parameters())
    arrangement = arrange(model.flat.slots, 2, bucket=2000)
    gradients = Gradients(parameters, arrangement, torch.float64)
    name = "model.layers.1.mlp.up_proj.weight"
    place = arrangement.places[name]
    ready: list[int] = []
    gradients.begin(lambda data: ready.append(data.storage_offset()))
    gradients.last(pending={name})
    highest = max(stop for start, stop in arrangement.buckets if start < place + parameters[name].numel())
    assert ready and min(ready) >= highest
    assert not gradients.data.any(), "what got no gradient has gradient zero"
    gradients.add(name, torch.ones_like(parameters[name]))
    gradients.finish()
    assert len(ready) == len(arrangement.buckets)
    assert gradients.data.sum() == parameters[name].numel()
    gradients.close()


def test_a_model_has_one_engine_at_a_time(model: CausalModel) -> None:
    parameters = dict(model.module.named_parameters())
    arrangement = arrange(model.flat.slots, 1)
    first = Gradients(parameters, arrangement, torch.float64)
    with pytest.raises(AssertionError, match="has not been closed"):
        Gradients(parameters, arrangement, torch.float64)
    first.close()
    Gradients(parameters, arrangement, torch.float64).close()
