"""What is certain of memory: no step needs more than a plan's certificate says."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_parts import CARD, GRPO, part_of, plan_of
from small_cards import llama_card

from planner.callbytes import call_bytes
from planner.decoder import read_decoder
from planner.decoderparts import option_bytes
from planner.lengths import read_lengths
from planner.loads import Batch, batch_load, worst_load
from planner.sizes import Part, Parts
from realflow.graph import find_graph, load_graph
from realflow.graph.types import Graph
from realflow.layout import Layout
from realflow.planfile import CallPlan
from realflow.planfile.holdings import holdings

# ---------------------------------------------------------------- what is certain


def graph_of(prompts: int, samples: int, minibatches: int, prompt: int, response: int) -> Graph:
    sizes = {"prompts": prompts, "samples": samples, "minibatches": minibatches, "max_new_tokens": response}
    graph = load_graph(find_graph("grpo"), [f"{name}={value}" for name, value in sizes.items()])
    return dataclasses.replace(graph, data=dataclasses.replace(graph.data, max_length=prompt))


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[Graph, CallPlan, str, Part]:
    """A graph, and how one of its calls runs on one of the parts of a model."""
    prompts, samples = draw(st.integers(1, 6)), draw(st.integers(2, 4))
    most = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    minibatches = draw(st.sampled_from([n for n in (1, 2, 3) if prompts % n == 0]))
    graph = graph_of(prompts, samples, minibatches, *most)
    layout = draw(st.sampled_from([Layout.parse(text) for text in ("d1", "d2", "d3", "t2", "p2", "d2t2p2")]))
    where = CallPlan(
        tuple(range(layout.size)),
        layout,
        "train",
        micro_batch_tokens=draw(st.sampled_from((16, 100, 500, 4096))),
        slots=draw(st.integers(1, 9)),
        schedule=draw(st.sampled_from(("1f1b", "zero_bubble"))),
        recompute=draw(st.booleans()),
        sequence_parallel=draw(st.booleans()),
    )
    vocab, tied = draw(st.sampled_from((100, 60_000))), draw(st.booleans())
    card = llama_card(4, 32, 4, 2, draw(st.integers(8, 99)), vocab, tied=tied)
    part = part_of(card, str(layout), draw(st.integers(0, layout.size - 1)))
    return graph, where, draw(st.sampled_from(("rollout", "ref", "train"))), part


def needed(graph: Graph, where: CallPlan, name: str, part: Part, batch: Batch | None = None) -> int:
    """Bytes of a call: at most, or where prompts and responses are as long as `batch` says."""
    lengths, call = read_lengths(graph), graph.call(name)
    longest = lengths.longest_prompt, lengths.longest_response
    if batch is None:
        load = worst_load(graph, call, where, longest, part.positions)
    else:
        load = batch_load(graph, call, where, batch, part.positions)
    one = call_bytes(graph, call, where, part, load, host=True)
    return one.weights + one.own_bytes + one.active_bytes


@settings(max_examples=100, deadline=None)
@given(settings_of(), st.data())
def test_no_lengths_need_more_than_the_certificate(
    given: tuple[Graph, CallPlan, str, Part], data: st.DataObject
) -> None:
    graph, where, name, part = given
    lengths = read_lengths(graph)
    responses = st.integers(1, lengths.longest_response)
    batch = [
        (
            data.draw(st.integers(1, lengths.longest_prompt)),
            data.draw(st.lists(responses, min_size=graph.samples, max_size=graph.samples)),
        )
        for _ in range(graph.prompts)
    ]
    assert needed(graph, where, name, part, batch) <= needed(graph, where, name, part)


def whole(graph: Graph) -> Graph:
    """The graph with a loss that looks at the samples of a prompt together."""
    calls = [
        dataclasses.replace(call, decl=dataclasses.replace(call.decl, scope="group"))
        if call.op == "train"
        else call
        for call in graph.calls
    ]
    return dataclasses.replace(graph, calls=tuple(calls))


@settings(max_examples=60, deadline=None)
@given(settings_of(), st.data())
def test_whole_groups_need_no_more_than_their_certificate(
    given: tuple[Graph, CallPlan, str, Part], data: st.DataObject
) -> None:
    """And that is never less than where samples may be divided."""
    plain, where, _, part = given
    graph, lengths = whole(plain), read_lengths(plain)
    responses = st.integers(1, lengths.longest_response)
    batch = [
        (
            data.draw(st.integers(1, lengths.longest_prompt)),
            data.draw(st.lists(responses, min_size=graph.samples, max_size=graph.samples)),
        )
        for _ in range(graph.prompts)
    ]
    most = needed(graph, where, "train", part)
    assert needed(graph, where, "train", part, batch) <= most
    assert most >= needed(plain, where, "train", part)


@settings(max_examples=60, deadline=None)
@given(settings_of(), st.integers(1, 100))
def test_more_of_anything_never_needs_less(given: tuple[Graph, CallPlan, str, Part], more: int) -> None:
    """Longer prompts and responses, larger micro-batches, more slots."""
    graph, where, name, part = given
    least = needed(graph, where, name, part)
    new = graph.call("rollout").sampling.max_new_tokens + more  # type: ignore[union-attr]
    sizes = graph.prompts, graph.samples, graph.call("train").minibatches
    prompt = graph.data.prompt_tokens
    assert needed(graph_of(*sizes, prompt, new), where, name, part) >= least
    assert needed(graph_of(*sizes, prompt + more, new - more), where, name, part) >= least
    wider = dataclasses.replace(where, micro_batch_tokens=where.micro_batch_tokens + more)
    assert needed(graph, wider, name, part) >= least
    assert needed(graph, dataclasses.replace(where, slots=where.slots + more), name, part) >= least


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(
        [("d2",), ("t2",), ("d1@0", "train=d1@1"), ("d2", "rollout=t2"), ("p2", "ref=d2:offload")]
    ),
    st.sampled_from(("cpu", "cuda")),
)
def test_calls_alone_add_up_to_no_less_than_a_rank(layouts: tuple[str, ...], kind: str) -> None:
    """What the search adds up, each holding once and the most active call, covers the certificate but for
    buckets and generation beside other calls; alone on a rank, a call needs what the certificate says."""
    plan = plan_of(CARD, 2, *layouts, kind=kind)
    parts, lengths = Parts(GRPO, dict.fromkeys(GRPO.models, CARD)), read_lengths(GRPO)
    longest = lengths.longest_prompt, lengths.longest_response
    for rank, memory in plan.memory.items():
        static: dict[object, int] = {}
        own, active = 0, [0]
        for call in GRPO.calls:
            where = plan.calls[call.name]
            if call.model and rank in where.ranks:
                held = holdings(where)[rank]
                part = parts.of(call.model, held)
                load = worst_load(GRPO, call, where, longest, part.positions)
                one = call_bytes(GRPO, call, where, part, load, host=kind == "cpu")
                static[call.model, held] = max(static.get((call.model, held), 0), one.weights)
                own += one.own_bytes
                active.append(one.active_bytes)
        skipped = ("process", "margin", "buckets")
        certificate = sum(size for cause, size in memory.items() if cause not in skipped)
        together = sum(static.values()) + own + max(active)
        assert together >= certificate
        if layouts == ("d1@0", "train=d1@1") and rank == 1:
            assert together == certificate, "training is alone there"


def test_an_option_needs_what_its_fullest_rank_needs() -> None:
    """From a config alone and from a card: the same bytes, on whole ranks and cut ones."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "hidden_act": "silu",
    }  # fmt: skip
    decoder = read_decoder(config)
    lengths = read_lengths(GRPO)
    longest = lengths.longest_prompt, lengths.longest_response
    for text in ("d1", "d2", "t2", "p2", "t2p2"):
        layout = Layout.parse(text)
        for name in ("rollout", "ref", "train"):
            call, where = GRPO.call(name), CallPlan(tuple(range(layout.size)), layout, "train")
            option = option_bytes(GRPO, call, where, decoder, longest)
            ranks = []
            for rank in range(layout.size):
                part = part_of(CARD, text, rank)
                load = worst_load(GRPO, call, where, longest, part.positions)
                ranks.append(call_bytes(GRPO, call, where, part, load))
            assert option.weights == pytest.approx(max(one.weights for one in ranks), rel=0.02)
            assert option.own_bytes == pytest.approx(max(one.own_bytes for one in ranks), rel=0.02)
            assert option.active_bytes == pytest.approx(max(one.active_bytes for one in ranks), rel=0.02)
