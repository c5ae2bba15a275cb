"""Lengths of a graph: numbers, distributions, a former run; what is typical and what is longest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.lengths import Lengths, Pair, quantised, read_lengths
from realflow.errors import InputError
from realflow.graph import find_graph, load_graph
from realflow.graph.lengths import WIDEST_P90
from realflow.graph.load import graph_to_mapping
from realflow.graph.types import Graph, Spread


def graph(lengths: Mapping[str, Any] | None = None, **changes: Any) -> Graph:
    values: dict[str, Any] = {
        "name": "lengths",
        "models": {"actor": {"path": "a", "optimizer": {"lr": 1e-5}}},
        "data": {"source": "my.data:rows", "fields": {"prompt": "question"}, "max_length": 500},
        "calls": {
            "rollout": {
                "model": "actor", "op": "generate", "batch": "4 prompts", "samples": 4,
                "max_new_tokens": 2000,
            },
            "reward": {"op": "function", "use": "rewards.last_number", "reads": {"answer": "prompt"}},
            "credit": {"op": "function", "use": "advantages.grpo"},
            "train": {"model": "actor", "op": "train", "use": "losses.ppo_clip"},
        },
        "steps": 1,
    }  # fmt: skip
    if lengths is not None:
        values["lengths"] = dict(lengths)
    return load_graph(values | changes)


def problems(lengths: Mapping[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        graph(lengths)
    return str(error.value)


def mean(weighted: list[tuple[int, float]]) -> float:
    return sum(length * weight for length, weight in weighted)


def test_nothing_given_is_as_long_as_allowed_and_said_so() -> None:
    found = read_lengths(graph())
    assert found.pairs == (Pair(500, 2000, 1.0),)
    assert found.assumed and "data.max_length" in found.note and "max_new_tokens" in found.note


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_shipped_graphs_say_how_long_their_prompts_are(name: str) -> None:
    found = read_lengths(load_graph(find_graph(name), ["max_new_tokens=99"]))
    assert found.pairs == (Pair(46, 99, 1.0),) and found.common == 35


def test_numbers_and_what_memory_must_hold() -> None:
    found = read_lengths(graph({"prompt": 300, "response": 1200, "common": 40}))
    assert found.pairs == (Pair(300, 1200, 1.0),)
    assert (found.longest_prompt, found.longest_response, found.common) == (500, 2000, 40)
    assert not found.assumed


@settings(max_examples=40, deadline=None)
@given(
    st.floats(2, 5000),
    st.one_of(
        st.tuples(st.just("std"), st.floats(0.01, 3)), st.tuples(st.just("p90"), st.floats(1, WIDEST_P90))
    ),
    st.floats(1.05, 20),
)
def test_a_distribution_keeps_its_mean_and_stays_within_bounds(
    centre: float, wide: tuple[str, float], room: float
) -> None:
    longest = math.ceil(centre * room)
    spread = Spread(centre, **{wide[0]: centre * wide[1]}, longest=longest)
    found = quantised(spread, longest)
    assert math.isclose(sum(weight for _, weight in found), 1.0)
    assert all(1 <= length <= longest for length, _ in found)
    assert abs(mean(found) - centre) <= 0.5 + 1e-6 * centre  # rounded to whole tokens
    lengths = [length for length, _ in found]
    assert lengths == sorted(lengths)


def test_a_wider_distribution_has_a_longer_tail_and_p90_means_what_it_says() -> None:
    tails = [max(quantised(Spread(1000, std=std), 100_000))[0] for std in (10, 200, 800)]
    assert tails == sorted(tails) and tails[0] < tails[-1]
    found = quantised(Spread(1000, p90=1800), 100_000)
    assert 0.85 <= sum(weight for length, weight in found if length <= 1800) <= 0.95


def test_a_trace_is_what_the_run_had(tmp_path: Path) -> None:
    rows = [{"step": s, "length": 5 + 3 * s, "prompt_length": 20 + s % 2} for s in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 12, "leng'  # cut off
    (tmp_path / "samples.jsonl").write_text(text)
    for trace in (tmp_path, tmp_path / "samples.jsonl"):
        found = read_lengths(graph({"trace": str(trace)}))
        assert {(pair.prompt, pair.response) for pair in found.pairs} == {
            (row["prompt_length"], row["length"]) for row in rows
        }
        assert found.response == pytest.approx(fmean(row["length"] for row in rows))
    given_prompts = read_lengths(graph({"trace": str(tmp_path), "prompt": 77}))
    assert {pair.prompt for pair in given_prompts.pairs} == {77}


def test_a_long_trace_is_grouped_with_its_means(tmp_path: Path) -> None:
    rows = [(50 + (s * 7) % 211, 1 + (s * s) % 1789) for s in range(3000)]
    (tmp_path / "samples.jsonl").write_text(
        "".join(json.dumps({"length": r, "prompt_length": p}) + "\n" for p, r in rows)
    )
    found = read_lengths(graph({"trace": str(tmp_path)}))
    assert len(found.pairs) <= 200
    assert found.prompt == pytest.approx(fmean(p for p, _ in rows), abs=1)
    assert found.response == pytest.approx(fmean(r for _, r in rows), abs=1)
    assert max(pair.response for pair in found.pairs) > 0.95 * max(r for _, r in rows)


def test_a_trace_without_lengths_or_without_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(InputError, match="no sample with its length"):
        read_lengths(graph({"trace": str(tmp_path)}))
    with pytest.raises(InputError, match="no such file"):
        read_lengths(graph({"trace": str(tmp_path / "nowhere")}))


LENGTHS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 50), st.floats(0.1, 1)), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.integers(1, 6))
def test_a_typical_step_has_the_lengths_in_their_proportions(
    rows: list[tuple[int, int, float]], prompts: int, samples: int
) -> None:
    total = sum(weight for _, _, weight in rows)
    pairs = tuple(sorted(Pair(p, r, w / total) for p, r, w in rows))
    lengths = Lengths(pairs, 9, 50, "")
    batch = lengths.batch(prompts, samples)
    assert len(batch) == prompts and all(len(responses) == samples for _, responses in batch)
    known = {(pair.prompt, pair.response) for pair in pairs}
    assert all((prompt, response) in known for prompt, responses in batch for response in responses)
    assert batch == Lengths(pairs, 9, 50, "").batch(prompts, samples)
    many = lengths.batch(40, 25)
    assert fmean(r for _, some in many for r in some) == pytest.approx(lengths.response, rel=0.1, abs=1)


def test_a_call_that_ends_earlier_has_shorter_responses() -> None:
    lengths = Lengths((Pair(3, 10, 0.5), Pair(3, 20, 0.25), Pair(3, 30, 0.25)), 9, 50, "")
    cut = lengths.up_to(15)
    assert cut.pairs == (Pair(3, 10, 0.5), Pair(3, 15, 0.5))
    assert cut.longest_response == 15
    assert lengths.up_to(30) is lengths


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ({}, "is empty"),
        ({"prompt": 0}, "a number of tokens"),
        ({"prompt": "long"}, "a number of tokens"),
        ({"prompt": 600}, "data.max_length"),
        ({"response": 2001}, "max_new_tokens"),
        ({"response": {"std": 3}}, "'mean' is missing"),
        ({"response": {"mean": 9, "std": 1, "p90": 12}}, "remove one"),
        ({"response": {"mean": 100, "p90": 90}}, "found 90"),
        ({"response": {"mean": 100, "max": 50}}, "at least the mean"),
        ({"response": {"mean": 100, "max": 5000}}, "max_new_tokens"),
        ({"response": {"mean": 100, "median": 50}}, "unknown key"),
        ({"prompt": 30, "common": 40}, "at most the tokens of a prompt"),
        ({"trace": "x", "response": 3}, "remove 'response' or 'trace'"),
    ],
)
def test_what_is_wrong_is_named(lengths: Mapping[str, Any], said: str) -> None:
    assert said in problems(lengths)


@pytest.mark.parametrize(
    "lengths",
    [
        {"prompt": 300, "response": 1200},
        {"prompt": {"mean": 300, "std": 80.5}, "response": {"mean": 1200, "p90": 1900, "max": 2000}},
        {"trace": "/runs/former", "prompt": 30, "common": 12},
    ],
)
def test_a_graph_with_lengths_is_written_and_read_back(lengths: Mapping[str, Any]) -> None:
    loaded = graph(lengths)
    written = graph_to_mapping(loaded)
    assert written["lengths"] == lengths
    assert load_graph(written) == loaded


def test_a_trace_lies_beside_the_graph_file_and_must_be_there(tmp_path: Path) -> None:
    text = json.dumps(graph_to_mapping(graph({"trace": "old/samples.jsonl"})))
    file = tmp_path / "graph.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match="no such file"):
        load_graph(file)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "samples.jsonl").write_text('{"length": 7, "prompt_length": 3}\n')
    loaded = load_graph(file)
    assert loaded.lengths is not None and loaded.lengths.trace == str(tmp_path / "old" / "samples.jsonl")
    assert read_lengths(loaded).pairs == (Pair(3, 7, 1.0),)
