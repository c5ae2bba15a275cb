"""A small model's card, in a cache of its own, without building the model."""

from __future__ import annotations

import pytest

from realflow.models.card import Card, Parameter


def make_card(**changes: object) -> Card:
    values: dict[str, object] = dict(  # noqa: C408, the same form as the call below
        hash="0123456789abcdef",
        architecture="LlamaForCausalLM",
        model_type="llama",
        parameters=(
            Parameter("model.embed_tokens.weight", (100, 16), "bfloat16"),
            Parameter("model.layers.0.self_attn.q_proj.weight", (16, 16), "bfloat16"),
            Parameter("model.norm.weight", (16,), "bfloat16"),
        ),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        layers=2,
        hidden=16,
        intermediate=32,
        heads=4,
        kv_heads=2,
        head_dim=4,
        vocab=100,
        max_positions=64,
        tensor_styles={"model.layers.*.self_attn.q_proj": "colwise"},
        pipeline_styles={"model.norm": (("hidden_states",), ("hidden_states",))},
    )
    return Card(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def small_card() -> Card:
    return make_card()
