"""Pairs in the data, losses that see whole groups, and how a train call weighs tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from realflow.errors import InputError
from realflow.graph import explain_batch, find_graph, graph_to_mapping, load_graph, loss
from realflow.graph.functions import declaration

PAIRS: dict[str, Any] = {
    "name": "pairs",
    "models": {
        "actor": {"path": "m", "optimizer": {"lr": 1e-5}},
        "ref": {"path": "m"},
    },
    "data": {
        "source": "rows:pairs",
        "fields": {"prompt": "question", "chosen": "good", "rejected": "bad"},
        "tokenize": "actor",
        "batch": "6 prompts",
    },
    "calls": {
        "ref": {"model": "ref", "op": "infer", "use": "logprobs", "writes": {"logprobs": "ref_logprobs"}},
        "train": {"model": "actor", "op": "train", "use": "losses.dpo", "minibatches": 2},
    },
    "steps": 3,
}


def changed(**parts: dict[str, Any]) -> dict[str, Any]:
    """The graph with keys of `data` or of its train call set; None removes one."""
    graph = copy.deepcopy(PAIRS)
    for part, keys in parts.items():
        place = graph["data"] if part == "data" else graph["calls"][part]
        place.update(keys)
        for key in [key for key, value in keys.items() if value is None]:
            del place[key]
    return graph


def test_pairs_are_two_samples_of_a_prompt() -> None:
    graph = load_graph(PAIRS)
    assert graph.data.pairs and (graph.prompts, graph.samples) == (6, 2)
    assert {name: graph.extents[name] for name in ("tokens", "group_id", "chosen")} == {
        "tokens": "token",
        "group_id": "sample",
        "chosen": "sample",
    }
    assert graph.dtypes["chosen"] == "bool" and "rejected" not in graph.extents
    train = graph.call("train")
    assert train.whole_groups and not graph.call("ref").whole_groups
    assert train.options["normalise"] == "sequence"
    assert "6 prompts × 2 samples each = 12 samples a step" in explain_batch(graph)
    assert "each sequence counting the same" in explain_batch(graph)
    assert load_graph(graph_to_mapping(graph)) == graph
    assert load_graph(changed(data={"batch": "12 samples"})).prompts == 6


def test_without_tokenizing_they_are_columns_like_others() -> None:
    graph = load_graph(
        {
            **copy.deepcopy(PAIRS),
            "models": {"actor": {"path": "m"}},
            "data": {"source": "rows:pairs", "fields": {"prompt": "q", "chosen": "good"}},
            "calls": {
                "rollout": {"model": "actor", "op": "generate", "batch": "2 prompts", "max_new_tokens": 4}
            },
        }
    )
    assert not graph.data.pairs and graph.samples == 1 and graph.extents["chosen"] == "prompt"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"data": {"batch": "5 samples"}},
            "found 5 samples, but a pair is two samples; expected an even number",
        ),
        (
            {"data": {"fields": {"prompt": "q", "chosen": "good"}}},
            "'tokenize' needs the field 'rejected'; name its column under 'fields'",
        ),
        (
            {"data": {"fields": {"prompt": "q", "completion": "c", "chosen": "good", "rejected": "bad"}}},
            "'tokenize' takes either the field 'completion' or 'chosen' and 'rejected'",
        ),
        (
            {"data": {"fields": {"prompt": "q", "completion": "c"}}},
            "reads the field 'group_id' (as 'group_ids'), which nothing writes",
        ),
        (
            {"train": {"minibatches": 4}},
            "found 4, expected a number that divides the 6 prompts of a step (whole groups): losses.dpo "
            "looks at the samples of a prompt together",
        ),
        ({"train": {"minibatches": 12}}, "found 12, expected a number that divides the 6 prompts"),
        ({"train": {"options": {"beta": 0}}}, "found 0, expected a number above 0"),
        ({"train": {"use": "losses.reward_model"}}, "needs 'scores', which 'head: reward' gives"),
        ({"train": {"normalise": {"constant": 0}}}, "expected token, sequence or {constant: a number"),
        ({"train": {"normalise": {"tokens": 9}}}, "the only key of a mapping here is 'constant'"),
    ],
)
def test_what_does_not_fit_is_told(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_graph(changed(**parts))
    assert any(message in str(problem) for problem in caught.value.problems), caught.value


def test_pairs_and_a_rollout_do_not_go_together() -> None:
    graph = changed()
    rollout = {"model": "actor", "op": "generate", "batch": "6 prompts", "samples": 2, "max_new_tokens": 4}
    names = ("tokens", "logprobs", "loss_mask", "versions", "finish_reason", "group_id", "completion")
    graph["calls"]["rollout"] = {**rollout, "writes": {name: f"drawn_{name}" for name in names}}
    with pytest.raises(InputError, match="pairs have two samples a prompt, but call rollout draws its own"):
        load_graph(graph)


def test_shipped_graphs_of_pairs() -> None:
    for name in ("dpo", "reward_model"):
        graph = load_graph(find_graph(name))
        assert graph.data.pairs and graph.name == name
    assert load_graph(find_graph("dpo"), ["loss=ipo", "beta=0.5"]).call("train").decl.name == "losses.ipo"
    with pytest.raises(InputError, match=r"unknown function 'losses\.dp'; did you mean 'losses\.dpo'"):
        load_graph(find_graph("dpo"), ["loss=dp"])


# ---------------------------------------------------------------- normalise


def test_normalise_comes_from_the_loss_unless_the_call_says_otherwise() -> None:
    assert load_graph(changed(train={"normalise": "token"})).call("train").options["normalise"] == "token"
    graph = load_graph(changed(train={"normalise": {"constant": 1024}}))
    assert graph.call("train").options["normalise"] == {"constant": 1024.0}
    assert "each sequence's sum over its tokens divided by 1024" in explain_batch(graph)
    for one in (graph, load_graph(changed(train={"normalise": "token"}))):
        assert load_graph(graph_to_mapping(one)) == one
    assert "normalise" not in graph_to_mapping(load_graph(PAIRS))["calls"]["train"]


# ---------------------------------------------------------------- declared losses


def test_a_users_loss_may_see_groups_and_take_the_mask() -> None:
    @loss(reads={"group_id": "sample int"}, scope="group", normalise="sequence")
    def pairwise(logprobs, mask, lengths, group_id):
        return None

    found = declaration(pairwise)
    assert found is not None and (found.scope, found.normalise) == ("group", "sequence")

    @loss(reads={})
    def plain(logprobs):
        return None

    found = declaration(plain)
    assert found is not None and (found.scope, found.normalise) == ("sample", "token")


def test_a_loss_never_sees_the_batch() -> None:
    with pytest.raises(InputError, match="scope 'batch'; expected one of sample, group"):

        @loss(reads={}, scope="batch")
        def whole(logprobs):
            return None
