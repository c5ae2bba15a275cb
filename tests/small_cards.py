"""Cards of small models, without building the models."""

from __future__ import annotations

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


STYLES = {
    "lm_head": "colwise_gather_output",
    "model.embed_tokens": "embedding_rowwise",
    **{f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
STAGES = {
    "lm_head": (("hidden_states",), ("logits",)),
    "model.embed_tokens": (("input_ids",), ("inputs_embeds",)),
    "model.layers": (("hidden_states", "attention_mask"), ("hidden_states",)),
    "model.norm": (("hidden_states",), ("hidden_states",)),
}


def llama_card(
    layers: int = 4,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 48,
    vocab: int = 100,
    *,
    tied: bool = True,
    **changes: object,
) -> Card:
    """The card of a Llama of these sizes, with the plans that transformers publishes for it."""
    size = hidden // heads
    shapes = {"model.embed_tokens": (vocab, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj": (kv_heads * size, hidden) for name in "kv"}
        shapes |= {f"{at}.self_attn.q_proj": (heads * size, hidden)}
        shapes |= {f"{at}.self_attn.o_proj": (hidden, heads * size)}
        shapes |= {f"{at}.mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (hidden, intermediate)}
        shapes |= {f"{at}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm": (hidden,)} | ({} if tied else {"lm_head": (vocab, hidden)})
    return make_card(
        **{
            "parameters": tuple(Parameter(f"{n}.weight", s, "bfloat16") for n, s in shapes.items()),
            "tied": {"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
            "layers": layers,
            "hidden": hidden,
            "intermediate": intermediate,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": size,
            "vocab": vocab,
            "max_positions": 2048,
            "tensor_styles": STYLES,
            "pipeline_styles": STAGES,
            **changes,
        }
    )


NINE_HEADS = {
    "model_type": "llama",
    "hidden_size": 72,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""The config of `llama_card(hidden=72, heads=9, kv_heads=3)`."""
