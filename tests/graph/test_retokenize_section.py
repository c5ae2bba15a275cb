"""`retokenize:` of an infer call: what the call then reads, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph
from realflow.graph.types import Call, Graph, Retokenize


def mapping(value: object = True, **reward: Any) -> dict[str, Any]:
    """The graph `ppo` with a reward call that says `retokenize: value`."""
    found = graph_to_mapping(load_graph(find_graph("ppo"), ["model=m", "reward_model=r"]))
    found["calls"]["reward"] |= {"retokenize": value, **reward}
    return found


def reward(graph: Graph) -> Call:
    return graph.call("reward")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, Retokenize()),
        ({}, Retokenize()),
        ({"chat": False}, Retokenize(chat=False)),
        ({"max_length": 64, "over": "truncate"}, Retokenize(max_length=64, over="truncate")),
        (False, None),
    ],
)
def test_it_is_read_and_written(value: object, expected: Retokenize | None) -> None:
    graph = load_graph(mapping(value))
    assert reward(graph).retokenize == expected
    text = {"prompt": "prompt", "completion": "completion", "finish_reason": "finish_reason"}
    assert reward(graph).reads == ({"tokens": "tokens"} if expected is None else text)
    assert load_graph(graph_to_mapping(graph)) == graph


def test_a_param_turns_it_on() -> None:
    found = mapping("${other}")
    found["params"]["other"] = False
    assert reward(load_graph(found)).retokenize is None
    assert reward(load_graph(found, ["other=true"])).retokenize == Retokenize()


def two_rollouts(**reads: str) -> Graph:
    """The reward model reads greedy answers to another column; there are drawn ones beside them."""
    found = mapping(reads={"completion": "greedy_text", **reads})
    found["data"]["fields"]["other"] = "answer"
    names = ("tokens", "logprobs", "loss_mask", "versions", "finish_reason", "group_id")
    found["calls"]["greedy"] = found["calls"]["rollout"] | {
        "temperature": 0,
        "reads": {"prompt": "other"},
        "writes": {**{name: f"greedy_{name}" for name in names}, "completion": "greedy_text"},
    }
    return load_graph(found)


def test_prompt_and_end_are_those_of_the_answers_that_are_read() -> None:
    graph = two_rollouts()
    wanted = {"prompt": "other", "completion": "greedy_text", "finish_reason": "greedy_finish_reason"}
    assert reward(graph).reads == wanted
    assert load_graph(graph_to_mapping(graph)) == graph
    assert reward(two_rollouts(prompt="answer")).reads == wanted | {"prompt": "answer"}


def test_completions_of_the_data_have_no_end_of_their_own() -> None:
    found = mapping(reads={"completion": "answer"})
    graph = load_graph(found)
    assert reward(graph).reads == {"prompt": "prompt", "completion": "answer"}
    assert load_graph(graph_to_mapping(graph)) == graph


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", r"calls\.reward\.retokenize: found the text 'yes', expected true, false or a mapping"),
        ({"over": "drop"}, r"calls\.reward\.retokenize\.over: .*expected one of error, truncate"),
        ({"max_length": 0}, r"calls\.reward\.retokenize\.max_length: found 0"),
        ({"template": 1}, r"calls\.reward\.retokenize.*unknown key 'template'"),
    ],
)
def test_other_values_are_refused(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        load_graph(mapping(value))
    assert len(refused.value.problems) == 1


def test_only_rewards_are_of_other_tokens() -> None:
    found = mapping(False)
    found["calls"]["ref"]["retokenize"] = True
    found["calls"]["train"]["retokenize"] = True
    with pytest.raises(InputError) as refused:
        load_graph(found)
    told = "\n".join(map(str, refused.value.problems))
    assert "calls.ref.retokenize: logprobs belong to the tokens that were drawn" in told
    assert "unknown key 'retokenize'; op train does not take it (op infer does)" in told


def test_a_system_message_needs_a_template() -> None:
    found = mapping({"chat": False})
    found["data"]["system"] = "be kind"
    with pytest.raises(InputError, match=r"calls\.reward\.retokenize\.chat: found false"):
        load_graph(found)
    found["calls"]["reward"]["retokenize"] = True
    assert load_graph(found).data.system == "be kind"
