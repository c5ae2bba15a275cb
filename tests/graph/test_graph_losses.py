"""How graphs wire the losses: masks, weights, proximal and teacher log probabilities come by their names."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from realflow.errors import InputError
from realflow.graph import graph_to_mapping, load_graph

GRAPH: dict[str, Any] = {
    "name": "wired",
    "models": {
        "actor": {"path": "m", "optimizer": {"lr": 1e-5}},
        "other": {"path": "n"},
    },
    "data": {"source": "rows:sums", "fields": {"prompt": "question", "answer": "answer"}},
    "calls": {
        "rollout": {
            "model": "actor", "op": "generate", "batch": "4 prompts", "samples": 2, "max_new_tokens": 8,
        },
        "reward": {"op": "function", "use": "rewards.last_number"},
        "credit": {"op": "function", "use": "advantages.grpo"},
        "other": {
            "model": "other", "op": "infer", "use": "logprobs", "writes": {"logprobs": "other_logprobs"},
        },
        "train": {"model": "actor", "op": "train", "use": "losses.ppo_clip"},
    },
    "steps": 2,
}  # fmt: skip


def changed(use: str, train: dict[str, Any] | None = None, **calls: dict[str, Any]) -> dict[str, Any]:
    """The graph with another loss, and more calls before it; `other` without a model drops that call."""
    graph = copy.deepcopy(GRAPH)
    graph["calls"]["train"] |= {"use": use, **(train or {})}
    last = graph["calls"].pop("train")
    graph["calls"] |= calls
    graph["calls"]["train"] = last
    return graph


PROX = {"model": "actor", "op": "infer", "use": "logprobs", "writes": {"logprobs": "prox_logprobs"}}
MASK = {"op": "function", "use": "masks.m2po", "options": {"threshold": 0.02}}


def test_m2pos_mask_takes_the_place_of_the_loss_mask_in_training_alone() -> None:
    train = {"reads": {"loss_mask": "m2po_mask"}}
    graph = load_graph(changed("losses.m2po", train, prox=PROX, mask=MASK))
    assert [call.name for call in graph.calls][-3:] == ["prox", "mask", "train"]
    assert graph.call("train").reads["loss_mask"] == "m2po_mask"
    assert graph.call("prox").reads["loss_mask"] == graph.call("mask").reads["loss_mask"] == "loss_mask"
    assert graph.call("mask").decl.scope == "batch" and graph.call("mask").options == {"threshold": 0.02}
    assert load_graph(graph_to_mapping(graph)) == graph


def test_decoupled_ppo_reads_who_drew_the_tokens_and_the_recomputed_policy() -> None:
    graph = load_graph(changed("losses.decoupled_ppo", {"options": {"cap": 5}}, prox=PROX))
    reads = graph.call("train").reads
    assert (reads["behaviour_logprobs"], reads["prox_logprobs"]) == ("logprobs", "prox_logprobs")
    assert graph.call("train").options["cap"] == 5.0
    assert load_graph(changed("losses.decoupled_ppo", prox=PROX)).call("train").options["cap"] is None
    with pytest.raises(InputError, match="'prox_logprobs', which nothing writes"):
        load_graph(changed("losses.decoupled_ppo"))


def test_distillation_is_joined_with_rl_where_there_are_advantages() -> None:
    teacher = {"reads": {"teacher_logprobs": "other_logprobs"}, "options": {"coef": 0.5}}
    joined = load_graph(changed("losses.distill", teacher))
    assert {"advantages", "old_logprobs", "teacher_logprobs"} <= joined.call("train").reads.keys()
    alone = changed("losses.distill", teacher)
    del alone["calls"]["credit"], alone["calls"]["reward"]
    reads = load_graph(alone).call("train").reads
    assert "advantages" not in reads and reads["old_logprobs"] == "logprobs"


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "cispo", "sapo", "m2po", "distill"])
def test_token_weights_are_read_where_something_writes_them(name: str) -> None:
    reads = {"teacher_logprobs": "other_logprobs"} if name == "distill" else {}
    plain = load_graph(changed(f"losses.{name}", {"reads": reads}))
    assert "weights" not in plain.call("train").reads
    named = load_graph(changed(f"losses.{name}", {"reads": {**reads, "weights": "other_logprobs"}}))
    assert named.call("train").reads["weights"] == "other_logprobs"


def test_a_kl_in_the_loss_needs_a_reference() -> None:
    options = {"options": {"kl_coef": 0.1}}
    for name in ("gspo", "cispo", "sapo"):
        with pytest.raises(InputError, match=r"found 0\.1, but nothing writes 'ref_logprobs'"):
            load_graph(changed(f"losses.{name}", options))
        load_graph(changed(f"losses.{name}", {**options, "reads": {"ref_logprobs": "other_logprobs"}}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ppo_clip", {"clip_low": 1.5}, "expected a number from 0 to 1"),
        ("gspo", {"dual_clip": 3.0}, "unknown key 'dual_clip'"),
        ("sapo", {"tau_positive": 0}, "expected a number above 0"),
        ("decoupled_ppo", {"cap": -1}, "expected a number above 0 or null"),
        ("cispo", {"kl": "k4"}, "expected one of k1, k2, k3"),
    ],
)
def test_wrong_options_are_told(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_graph(changed(f"losses.{name}", {"options": options}, prox=PROX))


def test_only_sequence_losses_are_normalised_by_sequence() -> None:
    found = {}
    for name in ("ppo_clip", "gspo", "cispo", "sapo", "m2po"):
        found[name] = load_graph(changed(f"losses.{name}")).call("train").options["normalise"]
    assert {name for name, how in found.items() if how == "sequence"} == {"gspo"}
    assert set(found.values()) == {"sequence", "token"}
