"""From a graph on a cluster to the options of its calls."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_scenes import cpus, gpus, models, shipped

from planner.costs import Costs
from planner.decoderparts import option_bytes
from planner.lengths import read_lengths
from planner.options import Ask, Built, Pin, TooLarge, Wishes, build
from planner.options.ways import Way, layouts, most_replicas, ways
from planner.rates import make_rates
from planner.search import Option
from realflow.graph.types import Follow, Graph
from realflow.layout import Layout
from realflow.planfile import Cluster

GRPO = shipped("grpo", "prompts=8", "samples=2")
PPO = shipped("ppo", "prompts=8")


def costs_of(graph: Graph, cluster: Cluster) -> Costs:
    node = cluster.nodes[0]
    decoders = models(graph).decoders
    return Costs(graph, decoders, read_lengths(graph), make_rates(node), per_node=node.devices)


def built(graph: Graph, cluster: Cluster, **ask: object) -> Built:
    return build(models(graph), cluster, Ask(**ask))  # type: ignore[arg-type]


def test_what_every_option_is() -> None:
    """Its layout has its size, whole tensor groups inside nodes, no idle replicas, no more stages than
    layers; its seconds and bytes are those of the cost and memory models."""
    cluster = gpus(2, 2)
    found = built(PPO, cluster)
    costs, lengths = costs_of(PPO, cluster), read_lengths(PPO)
    for call in found.problem.calls:
        source = PPO.call(call.name)
        assert call.options
        for index, option in enumerate(call.options):
            way = found.way(call.name, index)
            if source.model is None:
                assert option.places == (range(0),) and option.static_bytes == 0
                continue
            assert way.layout.size == option.size
            assert way.layout.pp <= 4 and way.layout.dp <= most_replicas(PPO, source)
            for place in option.places:
                groups = [range(at, at + way.layout.tp) for at in place[:: way.layout.tp]]
                assert all(group[0] // 2 == group[-1] // 2 for group in groups)
            assert option.seconds == costs.call(call.name, way).seconds
            assert option.offload_seconds == costs.offload(call.name, way).value
            longest = lengths.longest_prompt, lengths.longest_response
            needed = option_bytes(PPO, source, way, costs.decoders[source.model], longest)
            held = option.static_bytes, option.own_bytes, option.active_bytes
            assert held == (needed.weights, needed.own_bytes, needed.active_bytes)


@pytest.mark.parametrize("name", ["rollout", "train", "ref"])
def test_nothing_better_is_left_out(name: str) -> None:
    """Of all ways of all layouts, each is matched or beaten by an option of its size, and where weights move
    from or to it, of its layout. (The control: without the fastest option it is not so.)"""
    graph, cluster = GRPO, cpus(2)
    found, costs, lengths = built(graph, cluster), costs_of(graph, cluster), read_lengths(graph)
    call = graph.call(name)
    every = []
    for layout in (Layout(1), Layout(2), Layout(1, 2), Layout(1, 1, 2)):
        for way in ways(graph, call, layout, Wishes()):
            longest = lengths.longest_prompt, lengths.longest_response
            needed = option_bytes(graph, call, way, costs.decoders[str(call.model)], longest, host=True)
            seconds = costs.call(name, way).seconds + costs.offload(name, way).value
            every.append((way, (seconds, needed.weights, needed.own_bytes, needed.active_bytes)))
    options = found.problem.call(name).options

    def covered(options: tuple[Option, ...]) -> bool:
        return all(
            any(
                option.size == way.layout.size
                and (name == "ref" or option.layout == way.text)
                and all(a <= b for a, b in zip(numbers(option), values, strict=True))
                for option in options
            )
            for way, values in every
        )

    assert covered(options)
    fastest = min(options, key=lambda option: option.duration)
    assert not covered(tuple(option for option in options if option is not fastest))
    assert len(options) <= len(every)


def numbers(option: Option) -> tuple[float, int, int, int]:
    return option.duration, option.static_bytes, option.own_bytes, option.active_bytes


def test_what_waits_for_what() -> None:
    problem = built(PPO, cpus(2)).problem
    after = {call.name: set(call.after) for call in problem.calls}
    assert after["rollout"] == set()
    assert after["train"] >= {"rollout", "credit"} and after["train_critic"] >= {"values", "credit"}
    assert {call.name for call in problem.calls if call.trains} == {"train", "train_critic"}
    assert problem.overlap == 1
    free = built(replace(GRPO, max_staleness=1), cpus(2)).problem
    assert free.overlap == 2


def test_the_last_use_of_weights_comes_before_training() -> None:
    """A call that reads nothing of training, but uses the model that is trained, ends before."""
    extra = replace(GRPO.call("ref"), name="actor_logprobs", model="actor", writes={"logprobs": "mine"})
    calls = (*GRPO.calls[:-1], extra, GRPO.calls[-1])
    problem = built(replace(GRPO, calls=calls), cpus(2)).problem
    assert "actor_logprobs" in problem.call("train").after
    assert (
        "actor_logprobs"
        not in built(replace(GRPO, calls=calls, max_staleness=1), cpus(2)).problem.call("train").after
    )


def test_a_periodic_call_counts_for_its_share_of_steps() -> None:
    ref = replace(GRPO.call("ref"), every=4)
    calls = tuple(ref if call.name == "ref" else call for call in GRPO.calls)
    graph = replace(GRPO, calls=calls)
    found, costs = built(graph, cpus(2)), costs_of(graph, cpus(2))
    for index, option in enumerate(found.problem.call("ref").options):
        way = found.way("ref", index)
        assert option.seconds == costs.call("ref", way).seconds / 4
        assert option.offload_seconds == costs.offload("ref", way).value / 4


def test_moves_are_those_of_the_cost_model() -> None:
    cluster = gpus(2, 2)
    problem, costs = built(GRPO, cluster).problem, costs_of(GRPO, cluster)
    train = {option.layout for option in problem.call("train").options}
    rollout = {option.layout for option in problem.call("rollout").options}
    assert any(layout.endswith(":free") for layout in rollout)
    for source, into in sorted(product(train, rollout))[::7]:
        one, other = Layout.parse(source), Layout.parse(into.removesuffix(":free"))
        expected = costs.move("actor", "actor", one, other, 4)
        found = problem.moves["actor", source, into]
        assert found.apart == expected.apart
        if into.endswith(":free") and one == other:
            way = Way(other, after="offload")
            assert found.inside == costs.offload("rollout", way).value > 0, "it comes from the host"
        else:
            assert found.inside == expected.inside
    assert len(problem.moves) == len(train) * len(rollout)
    with pytest.raises(KeyError):
        problem.moves["ref", "d1t1p1", "d1t1p1"]
    with pytest.raises(KeyError):
        problem.moves["actor", "d1t1p1", "d3t3p3"]


def test_followers() -> None:
    ref = replace(GRPO.models["ref"], follows=Follow("actor", 0.9))
    problem = built(replace(GRPO, models={**GRPO.models, "ref": ref}), cpus(2)).problem
    assert problem.follows == {"ref": "actor"}
    source, into = problem.call("train").options[0].layout, problem.call("ref").options[0].layout
    assert problem.moves["ref", source, into].inside > 0


def test_kinds_of_devices_have_costs_of_their_own() -> None:
    mixed = Cluster((*gpus(1, 4).nodes, *gpus(1, 4, kind="a100-80gb").nodes))
    found = built(GRPO, mixed)
    by_pool: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for option in found.problem.call("train").options:
        if option.size == 4:
            first = option.places[0].start == 0
            best = by_pool[first].get(option.layout, float("inf"))
            by_pool[first][option.layout] = min(best, option.seconds)
        assert option.size <= 4, "no run mixes kinds"
    both = by_pool[True].keys() & by_pool[False].keys()
    assert both and all(by_pool[True][layout] < by_pool[False][layout] for layout in both)


@given(
    layout=st.sampled_from(["d2t1p1", "d1t2p1", "d4t1p1", "d1t1p2"]), start=st.sampled_from([None, 0, 2, 4])
)
@settings(max_examples=12, deadline=None)
def test_pins(layout: str, start: int | None) -> None:
    chosen = Layout.parse(layout)
    place = None if start is None else range(start, start + chosen.size)
    pin = Pin(chosen, place, Wishes(flags={"after": "offload"}))
    found = built(GRPO, gpus(1, 8), pins={"train": pin})
    for index, option in enumerate(found.problem.call("train").options):
        way = found.way("train", index)
        assert way.layout == chosen and way.after == "offload"
        assert place is None or option.places == (place,)
    assert {option.size for option in found.problem.call("rollout").options} == {1, 2, 4, 8}


def test_amounts_that_are_given_are_not_searched() -> None:
    found = built(GRPO, cpus(2), wishes=Wishes(micro_batch_tokens=2048, slots=5))
    for name in ("rollout", "train"):
        for index, _ in enumerate(found.problem.call(name).options):
            way = found.way(name, index)
            assert (way.slots == 5) if name == "rollout" else (way.micro_batch_tokens == 2048)


@pytest.mark.parametrize("memory", [900, 1000, 1100])
def test_the_most_slots_that_fit_are_an_option(memory: int) -> None:
    """Where the usual numbers are too many or too few; and powers of two below, where these are too many."""
    graph, cluster = shipped("grpo", "prompts=4", "samples=16", "max_new_tokens=3000"), gpus(1, 1)
    decoder, lengths = models(graph).decoders["actor"], read_lengths(graph)
    found = built(graph, gpus(1, 1, memory=memory << 20))
    room = found.problem.memory_bytes[0]
    listed = [found.way("rollout", index) for index in range(len(found.problem.call("rollout").options))]
    most = max(listed, key=lambda way: way.slots)

    def needs(slots: int) -> int:
        longest = lengths.longest_prompt, lengths.longest_response
        way = replace(most, slots=slots)
        needed = option_bytes(graph, graph.call("rollout"), way, decoder, longest)
        return needed.weights + needed.own_bytes + needed.active_bytes

    assert most.slots not in (16, 64) and needs(most.slots) <= room < needs(most.slots + 1)
    assert {1, 2, 4, 8} <= {way.slots for way in listed}
    usual = built(graph, cluster)
    assert {usual.way("rollout", i).slots for i in range(len(usual.problem.call("rollout").options))} == {
        16,
        64,
    }, "a control: where there is room, nothing else is looked at"


def test_a_call_that_fits_nowhere_is_named_with_its_leanest_way() -> None:
    with pytest.raises(TooLarge) as raised:
        built(GRPO, cpus(2, 770 << 20))
    assert raised.value.call in ("rollout", "train")
    least = raised.value.least
    total = least.needed.weights + least.needed.own_bytes + least.needed.active_bytes
    assert total > least.room >= 0


def test_large_clusters_have_few_layouts_of_each_size() -> None:
    """Else the search would drown; they are the fastest and the leanest. Those left out are counted; with
    powers of two none is."""
    graph, cluster = shipped("grpo", "prompts=128"), gpus(5)
    few, every = built(graph, cluster), built(graph, cluster, meshes="powers")
    assert set(sizes(every)) == {1, 2, 4, 8, 16, 32, 40}
    assert every.left_out == 0 < few.left_out
    for size, found in sizes(every).items():
        assert len(sizes(few)[size]) <= 5 and sizes(few)[size] <= found
        expected = {
            str(one)
            for one in layouts(size, 8, most_data=most_replicas(graph, graph.call("train")), most_stages=4)
        }
        assert found == expected, "all fit"
    assert any(len(found) > 5 for found in sizes(every).values()), "a control"


def sizes(found: Built) -> dict[int, set[str]]:
    """Number of devices -> layouts of the train call."""
    by_size: dict[int, set[str]] = {}
    for option in found.problem.call("train").options:
        by_size.setdefault(option.size, set()).add(option.layout)
    return by_size
