"""`refill:` of a generate call: read, checked, written back."""

from __future__ import annotations

from pathlib import Path

import pytest

from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph
from realflow.graph.refill import REFILL, judges, refilled
from realflow.graph.types import Graph

DECIDERS = """\
from realflow.graph import function

READS = {
    "rewards": "sample float",
    "group_ids": "sample int field=group_id",
    "hints": "sample float optional",
}

@function(reads=READS, writes={"stays": "sample bool"}, scope="group")
def mixed(rewards, group_ids, hints=None, *, least=0.0): ...

@function(reads={"advantages": "sample float"}, writes={"stays": "sample bool"}, scope="group")
def late(advantages): ...

@function(reads={"rewards": "sample float"}, writes={"stays": "sample bool"})
def single(rewards): ...

@function(reads={"rewards": "sample float"}, writes={"weight": "sample float"}, scope="group")
def weighing(rewards): ...

@function(reads={"completion": "sample text"}, writes={"rewards": "sample float"}, scope="batch")
def whole(completion): ...

@function(reads={"answer": "sample any"}, writes={"stays": "sample bool"}, scope="group")
def blind(answer): ...
"""
ROLLOUT = "    temperature: ${temperature}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refill")
    (folder / "refill_deciders.py").write_text(DECIDERS)
    return folder


def load(folder: Path, refill: str, **changes: str) -> Graph:
    text = find_graph("grpo").read_text().replace(ROLLOUT, f"{ROLLOUT}    refill: {refill}\n")
    for old, new in changes.items():
        text = text.replace(f"use: {old.replace('__', '.')}", f"use: {new}")
    path = folder / "graph.yaml"
    path.write_text(text)
    return load_graph(path)


def test_what_a_graph_says_is_read_and_written_back(folder: Path) -> None:
    graph = load(folder, "{use: refill_deciders:mixed, most: 5, options: {least: 0.5}}")
    call = refilled(graph.calls)
    assert call is not None and call.name == "rollout" and call.refill is not None
    inner = call.refill.call
    assert (inner.name, call.refill.most, inner.options) == (REFILL, 5, {"least": 0.5})
    assert inner.reads == {"rewards": "rewards", "group_ids": "group_id"}, "nothing writes hints"
    assert judges(graph.calls, call.refill) == {"rollout", "reward"}
    assert load_graph(graph_to_mapping(graph)) == graph
    assert graph_to_mapping(graph)["calls"]["rollout"]["refill"] == {
        "use": "refill_deciders:mixed", "most": 5, "options": {"least": 0.5}
    }  # fmt: skip
    renamed = load(folder, "{use: refill_deciders:late, reads: {advantages: rewards}}")
    assert load_graph(graph_to_mapping(renamed)) == renamed
    shipped = load(folder, "{use: select.mixed}")
    assert load_graph(graph_to_mapping(shipped)) == shipped
    plain = refilled(load_graph(find_graph("grpo")).calls)
    assert plain is None, "the control"


@pytest.mark.parametrize(
    ("refill", "changes", "parts"),
    [
        ("{use: refill_deciders:single}", {}, ["calls.rollout.refill.use", "of scope group"]),
        ("{use: refill_deciders:weighing}", {}, ["a bool for each sample"]),
        ("{use: advantages.grpo}", {}, ["cannot decide which groups stay"]),
        ("{most: 3}", {}, ["'use' is missing"]),
        ("{use: refill_deciders:mixed, most: 0}", {}, ["calls.rollout.refill.most", "a whole number >= 1"]),
        ("{use: refill_deciders:mixed, mots: 3}", {}, ["unknown key 'mots'", "did you mean 'most'?"]),
        (
            "{use: refill_deciders:mixed, reads: {rewards: reward}}",
            {},
            ["reads the field 'reward', which nothing writes", "did you mean 'rewards'?"],
        ),
        ("{use: refill_deciders:mixed, reads: {rewards: completion}}", {}, ["as float, found text"]),
        ("{use: refill_deciders:blind}", {}, ["reads nothing that hangs on what this call draws"]),
        (
            "{use: refill_deciders:mixed}",
            {"rewards__last_number": "refill_deciders:whole"},
            ["refill_deciders:whole sees a whole batch"],
        ),
    ],
)
def test_what_is_wrong_is_said(folder: Path, refill: str, changes: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load(folder, refill, **changes)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_only_a_generate_call_takes_it(folder: Path) -> None:
    text = find_graph("grpo").read_text()
    (folder / "wrong.yaml").write_text(
        text.replace("use: advantages.grpo", "use: advantages.grpo\n    refill: {use: refill_deciders:mixed}")
    )
    with pytest.raises(InputError, match="op function does not take it"):
        load_graph(folder / "wrong.yaml")
