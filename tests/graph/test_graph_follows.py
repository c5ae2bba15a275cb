"""A model that follows a trained one: read, checked, and written again."""

from __future__ import annotations

from typing import Any

import pytest

from realflow.errors import InputError
from realflow.graph import graph_to_mapping, load_graph
from realflow.graph.types import Follow


def mapping(follows: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    ref: dict[str, Any] = {"path": "some-model", **more.get("ref", {})}
    if follows is not None:
        ref["follows"] = follows
    return {
        "name": "following",
        "models": {"actor": {"path": "some-model", "optimizer": {"lr": 1e-5}}, "ref": ref},
        "data": {
            "source": "reasoning_gym",
            "task": "chain_sum",
            "fields": {"prompt": "question", "answer": "answer"},
        },
        "calls": {
            "rollout": {
                "model": "actor",
                "op": "generate",
                "batch": "8 prompts",
                "samples": 4,
                "max_new_tokens": 4,
            },
            "reward": {"op": "function", "use": "rewards.last_number"},
            "ref": {"model": "ref", "op": "infer", **more.get("call", {"use": "logprobs"})},
            "credit": {"op": "function", "use": "advantages.grpo"},
            "train": {"model": "actor", "op": "train", "use": "losses.ppo_clip", **more.get("train", {})},
        },
        "steps": 4,
    }


@pytest.mark.parametrize(("every", "steps"), [(None, 1), ("3 steps", 3)])
def test_a_model_that_follows_is_read_and_written_again(every: str | None, steps: int) -> None:
    follows = {"model": "actor", "decay": 0.99} | ({"every": every} if every else {})
    renamed = {"use": "logprobs", "writes": {"logprobs": "ref_logprobs"}}
    graph = load_graph(mapping(follows, call=renamed))
    assert graph.models["ref"].follows == Follow("actor", 0.99, steps)
    assert load_graph(graph_to_mapping(graph)) == graph
    assert load_graph(mapping(None, call=renamed)).models["ref"].follows is None


RENAMED = {"use": "logprobs", "writes": {"logprobs": "ref_logprobs"}}


@pytest.mark.parametrize(("rate", "decay"), [(0.25, 0.75), (0.01, 0.99), (1e-3, 0.999)])
def test_a_rate_is_what_decay_leaves(rate: float, decay: float) -> None:
    graph = load_graph(mapping({"model": "actor", "rate": rate}, call=RENAMED))
    assert graph == load_graph(mapping({"model": "actor", "decay": decay}, call=RENAMED))
    assert load_graph(graph_to_mapping(graph)) == graph


def test_a_rate_of_zero_never_follows() -> None:
    """The graph is then that of a model which does not follow."""
    graph = load_graph(mapping({"model": "actor", "rate": 0, "every": "3 steps"}, call=RENAMED))
    assert graph == load_graph(mapping(None, call=RENAMED))


@pytest.mark.parametrize(
    ("follows", "told"),
    [
        ({"rate": 1}, "found 1, expected a number from 0 to below 1"),
        ({"rate": -0.1}, "found -0.1, expected a number from 0 to below 1"),
        ({"decay": 0}, "found 0, expected a number above 0 and below 1"),
        ({"decay": 1}, "found 1, expected a number above 0 and below 1"),
        ({"rate": 0.1, "decay": 0.9}, "rate and decay say the same (rate is 1 - decay); keep one of them"),
        ({}, "decay"),
    ],
)
def test_what_is_no_share_is_refused(follows: dict[str, float], told: str) -> None:
    with pytest.raises(InputError) as error:
        load_graph(mapping({"model": "actor", **follows}, call=RENAMED))
    assert told in str(error.value) and len(error.value.problems) == 1


@pytest.mark.parametrize("follows", ["actor", {"decay": 0.9}, {"model": 3, "decay": 0.9}])
def test_what_names_no_model_is_told_once(follows: Any) -> None:
    """Nothing is said of a model that was never named."""
    with pytest.raises(InputError) as error:
        load_graph(mapping(follows, call={"use": "logprobs", "writes": {"logprobs": "ref_logprobs"}}))
    assert len(error.value.problems) == 1 and "unknown model" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"ref": {"head": "value"}, "call": {"use": "values"}},
            "'actor' has 'head: lm' and 'ref' 'head: value'",
        ),
        ({"train": {"every": "2 steps"}}, "found 3 steps, but 'actor' is trained every 2 steps"),
    ],
)
def test_what_cannot_follow_is_refused(more: dict[str, Any], told: str) -> None:
    more = {"call": {"use": "logprobs", "writes": {"logprobs": "ref_logprobs"}}, **more}
    with pytest.raises(InputError) as error:
        load_graph(mapping({"model": "actor", "decay": 0.9, "every": "3 steps"}, **more))
    assert told in str(error.value)
