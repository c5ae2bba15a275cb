"""What workers take from the data: chat or plain text, with or without the model, prompts in their limit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import write_graph
from scenes import grpo, place
from tiny import tiny_model

from realflow.api import plan
from realflow.data.balance import CostModel
from realflow.errors import InputError
from realflow.graph import load_graph
from realflow.models.card import Card, Parameter
from realflow.models.costs import cost_model, product_parameters
from realflow.planfile import Plan
from realflow.runtime.fields import Inputs, make_data
from realflow.runtime.functiontasks import FunctionTasks
from realflow.runtime.hosts import Hosts, draw_seed
from realflow.runtime.messages import DispatchDone, Execute
from realflow.runtime.store import FieldStore
from realflow.runtime.streams import Streams

PAIRS = """\
name: pairs
models:
  actor: {{path: {model}, dtype: float64, optimizer: {{lr: 1e-3}}}}
data:
  source: jsonl
  path: {data}
  fields: {{prompt: prompt, completion: completion}}
  tokenize: actor
  chat: {chat}
  batch: 2 prompts
calls:
  count:
    op: function
    use: "counting:lengths_of"
  train: {{model: actor, op: train, use: losses.sft}}
steps: 1
"""

COUNTING = """\
from realflow.graph import function

@function(reads={"tokens": "token int"}, writes={"count": "sample float"})
def lengths_of(tokens, lengths):
    return lengths.double()
"""


def pairs(folder: Path, chat: str) -> Plan:
    """A plan on two ranks: `count` reads the data's tokens on rank 0, the model is on rank 1."""
    model = tiny_model(folder / "model", dtype="float64")
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "abc", "completion": "defgh"}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "counting.py").write_text(COUNTING)
    path = folder / "pairs.yaml"
    path.write_text(PAIRS.format(model=model, data=folder / "pairs.jsonl", chat=chat))
    return plan(load_graph(path), devices=2, layouts={"count": "d1@0", "train": "d1@1"})


def hosts(made: Plan, rank: int) -> Hosts:
    return Hosts(made, rank, torch.device("cpu"), {})


@pytest.mark.parametrize("rank", [0, 1])
def test_data_tokens_are_the_same_with_and_without_the_model(tmp_path: Path, rank: int) -> None:
    made = pairs(tmp_path, "false")
    loaded = hosts(made, rank)
    assert (loaded.tokenizer("actor") is not None) == (rank == 1)
    data = make_data(made, loaded)
    found = sorted(len(tokens) for tokens in data.values("tokens", [0, 1]))
    assert found == [4 + 1 + 1, 3 + 5 + 1], "plain text: a token each character, and the end"


def test_chat_data_are_in_the_template(tmp_path: Path) -> None:
    made = pairs(tmp_path, "true")
    data = make_data(made, hosts(made, 0))
    assert min(len(tokens) for tokens in data.values("tokens", [0, 1])) > 20


def streams(folder: Path, max_length: int | None) -> Streams:
    graph = load_graph(write_graph(folder), ["steps=1"])
    made = plan(replace(graph, data=replace(graph.data, max_length=max_length)), devices=1, layouts="d1")
    loaded = hosts(made, 0)
    data = make_data(made, loaded)
    unused = SimpleNamespace()
    return Streams(made, 0, loaded, unused, data, unused)  # type: ignore[arg-type]


def test_a_prompt_over_the_limit_is_named(tmp_path: Path) -> None:
    rollout = load_graph(write_graph(tmp_path)).call("rollout")
    tasks = streams(tmp_path, 12)
    with pytest.raises(
        InputError, match=r"data\.max_length: the prompt of group 3 has \d+ tokens, more than 12"
    ):
        tasks._prompt(rollout, 3)
    taken = streams(tmp_path, None)._prompt(rollout, 3)
    assert taken.sample_ids == (12, 13, 14, 15)
    long = len(taken.tokens)
    assert len(streams(tmp_path, long)._prompt(rollout, 3).tokens) == long


def test_the_cache_is_as_long_as_the_plan_counts(tmp_path: Path) -> None:
    write_graph(tmp_path)
    text = (tmp_path / "tiny.yaml").read_text().replace("data:\n", "data:\n  max_length: 40\n")
    (tmp_path / "tiny.yaml").write_text(text)
    made = plan(load_graph(tmp_path / "tiny.yaml"), devices=1, layouts="d1", slots=3)
    engine = hosts(made, 0).generator(made.graph.call("rollout"))
    assert engine.max_length == 40 + 8
    config = engine._shape
    assert made.memory[0]["kv_cache"] == config.bytes(torch.float64)


def test_rollouts_draw_apart_and_the_main_one_as_without_the_others() -> None:
    alone, both = grpo(), grpo(second=1)
    seeds = [draw_seed(both, both.call(name)) for name in ("rollout", "greedy")]
    assert seeds[0] == draw_seed(alone, alone.call("rollout")) == alone.seed
    assert seeds[1] != seeds[0]
    assert 0 <= seeds[1] < 2**64
    other = replace(both, seed=2)
    assert draw_seed(other, other.call("greedy")) != seeds[1]
    assert place(both, 1, {}).graph == both


def sized(tied: bool) -> Card:
    shapes = [(100, 16), (16, 64)] + ([] if tied else [(100, 16)])
    parameters = tuple(Parameter(f"p{i}", shape, "float32") for i, shape in enumerate(shapes))
    return Card("0", "a", "m", parameters, {}, 2, 16, 64, 2, 2, 8, 100, 64, {}, {})


def test_an_input_embedding_alone_costs_nothing() -> None:
    assert product_parameters(sized(tied=True)) == product_parameters(sized(tied=False)) == 100 * 16 + 16 * 64
    assert cost_model(sized(tied=False)) == CostModel.for_sizes(params=2624, layers=2, hidden=16)


def test_a_function_is_told_the_lengths_of_data_tokens(tmp_path: Path) -> None:
    made = pairs(tmp_path, "false")
    sent: list[DispatchDone] = []
    link: Any = SimpleNamespace(send=sent.append)
    client: Any = SimpleNamespace(fetch_many=lambda wanted: [])
    data, store = make_data(made, hosts(made, 0)), FieldStore()
    inputs = Inputs(0, made.graph, store, client, data)
    message = Execute(1, "count@0.0", "count", 0, [[0, 1]], [])
    inputs.prefetch(message)
    FunctionTasks(made, 0, store, inputs, data, link).execute(message)
    inputs.close()
    assert sorted(store.get("count", [0, 1])) == [6.0, 9.0]
    assert sent[0].stats == {"count/count": [15.0, 2.0, 6.0, 9.0]}


def test_prompts_that_a_call_writes_are_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path)
    (tmp_path / "asking.py").write_text(
        "from realflow.graph import function\n\n"
        '@function(reads={"prompt": "prompt text"}, writes={"asked": "prompt text"})\n'
        "def ask(prompt):\n    return prompt\n"
    )
    limit = "    max_new_tokens: 8\n"
    text = path.read_text().replace(limit, f"{limit}    reads: {{prompt: asked}}\n")
    path.write_text(text.replace("calls:\n", 'calls:\n  ask: {op: function, use: "asking:ask"}\n'))
    with pytest.raises(InputError, match="reads the prompt 'asked', which call ask writes; prompts are read"):
        load_graph(path)


def test_a_limit_that_limits_nothing_is_refused(tmp_path: Path) -> None:
    pairs(tmp_path, "false")
    path = tmp_path / "pairs.yaml"
    text = path.read_text().replace("  tokenize: actor\n  chat: false\n", "  max_length: 9\n")
    path.write_text(text.partition("  train:")[0] + "steps: 1\n")
    with pytest.raises(InputError, match="limits tokens of the data, but no call generates"):
        load_graph(path)
