"""Whatever a file holds, reading it ends in a graph or in an InputError, and soon."""

import copy
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph, to_mermaid, to_svg
from realflow.graph.yamlfile import dump_yaml, parse_yaml

TEXT = find_graph("grpo").read_text()
GRPO = graph_to_mapping(load_graph(find_graph("grpo")))
ODD = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        2**80,
        1.5,
        float("nan"),
        float("-inf"),
        "",
        " ",
        "${",
        "${lr}",
        "8 prompts",
        "tokens",
        "a\0b",
        [],
        [[]],
        {},
        {"a": 1},
        {1: 2},
        {None: 3},
        {"": ""},
        b"bytes",
        object(),
        ("logprobs",),
        "logprobs",
        "rollout",
        "advantages.grpo",
        "losses.ppo_clip",
        "os:getcwd",
        "1 steps",
        "x" * 5000,
    ]
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every key path in plain values."""
    found = [path]
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    return found


PLACES = places(GRPO)[1:]


def changed(path: tuple, value: Any, how: str) -> dict:
    """GRPO with the value at a path replaced, removed, or joined by another key."""
    mapping = copy.deepcopy(GRPO)
    inner = mapping
    for key in path[:-1]:
        inner = inner[key]
    if how == "remove":
        del inner[path[-1]]
    elif how == "add" and isinstance(value, str | int):
        inner[value] = value
    else:
        inner[path[-1]] = value
    return mapping


changes = given(st.sampled_from(PLACES), ODD, st.sampled_from(["replace", "remove", "add"]))


@settings(max_examples=100, deadline=None)
@changes
def test_a_changed_graph_is_read_or_refused(path: tuple, value: Any, how: str) -> None:
    read_or_refused(path, value, how)


@pytest.mark.full
@settings(max_examples=3000, deadline=None)
@changes
def test_many_changed_graphs_are_read_or_refused(path: tuple, value: Any, how: str) -> None:
    read_or_refused(path, value, how)


def read_or_refused(path: tuple, value: Any, how: str) -> None:
    try:
        graph = load_graph(changed(path, value, how))
    except InputError as error:
        assert error.problems and all(problem.message for problem in error.problems)
        return
    assert load_graph(dump_yaml(graph_to_mapping(graph))) == graph
    to_svg(graph), to_mermaid(graph)


damages = given(
    st.integers(0, len(TEXT)),
    st.integers(0, 30),
    st.text(max_size=12) | st.sampled_from("{}[]:-&*!|>'\"%@`\n\t#"),
)


@settings(max_examples=100, deadline=None)
@damages
def test_a_damaged_file_is_read_or_refused(start: int, length: int, put: str) -> None:
    damaged(start, length, put)


@pytest.mark.full
@settings(max_examples=3000, deadline=None)
@damages
def test_many_damaged_files_are_read_or_refused(start: int, length: int, put: str) -> None:
    damaged(start, length, put)


def damaged(start: int, length: int, put: str) -> None:
    text = TEXT[:start] + put + TEXT[start + length :]
    try:
        load_graph(text)
    except InputError as error:
        assert all(problem.message for problem in error.problems)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"\xed\xa0\x80")
@example(b"\x00")
@example(b"? ")
@example(b"%YAML 9.9\n--- a")
@example(b"a: |99\n x")
@example(b"\xef\xbb\xbf")
@example("\u2028: \x85".encode())
def test_any_bytes_are_plain_values_or_an_input_error(data: bytes) -> None:
    try:
        parse_yaml(data)
    except InputError as error:
        assert all(problem.message for problem in error.problems)
