"""Models that RealFlow cannot run are refused when a plan is made, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from small_cards import llama_card
from transformers import AutoConfig

from planner import make_plan
from realflow.errors import InputError
from realflow.graph import find_graph, load_graph
from realflow.layout import Layout
from realflow.models.card import Card, build
from realflow.models.layouts import refusals
from realflow.models.partition import with_head
from realflow.planfile import Cluster, Node

GRPO, PPO = (load_graph(find_graph(name)) for name in ("grpo", "ppo"))
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
}


def card_of(folder: Path, kind: str, changes: Mapping[str, Any]) -> Card:
    """The card of a config alone: no weights are needed."""
    values = {**SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}
    AutoConfig.for_model(kind, **values).save_pretrained(folder)
    return build(folder)


REFUSED = {
    "cohere": ({"logit_scale": 0.0625}, "changes its logits after the head"),
    "gemma2": ({"final_logit_softcapping": 30.0}, "changes its logits after the head"),
    "granite": ({"logits_scaling": 8.0}, "changes its logits after the head"),
    "mixtral": ({"num_local_experts": 2}, "under other names or in other shapes"),
    "qwen3_moe": ({"num_experts": 2, "moe_intermediate_size": 8}, "under other names or in other shapes"),
    "opt": ({"word_embed_proj_dim": 32, "ffn_dim": 48}, "not a base model and a head after it"),
    "phi": ({}, "a linear head without bias"),
}
RUN = {
    "cohere": {"logit_scale": 1.0},
    "gemma2": {"final_logit_softcapping": None},
    "granite": {"logits_scaling": 1.0},
    "qwen3": {},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_cards_say_what_cannot_run(tmp_path: Path, kind: str) -> None:
    changes, reason = REFUSED[kind]
    card = card_of(tmp_path, kind, changes)
    assert reason in (card.unsupported or card.unsupported_head)
    assert any(reason in problem for problem in refusals(card, Layout())), "no layout helps"
    plan = {"actor": card, "ref": llama_card()}
    with pytest.raises(InputError, match=reason) as caught:
        make_plan(GRPO, Cluster((Node("local", 1, "cpu"),)), {"*": "d1"}, plan)
    assert [problem.where for problem in caught.value.problems] == ["graph.models.actor"]


@pytest.mark.parametrize("kind", RUN)
def test_cards_of_models_that_run(tmp_path: Path, kind: str) -> None:
    card = card_of(tmp_path, kind, RUN[kind])
    assert (card.unsupported, card.unsupported_head) == ("", "")


def test_other_heads_do_not_mind_a_soft_cap() -> None:
    card = dataclasses.replace(llama_card(), unsupported_head="a soft cap")
    assert refusals(card, Layout()) == ["a soft cap"]
    assert refusals(with_head(card, "value"), Layout()) == []
    body = dataclasses.replace(llama_card(), unsupported="experts")
    assert refusals(with_head(body, "value"), Layout()) == ["experts"]
