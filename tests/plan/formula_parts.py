"""Families of models, and the names of products, for tests of the planner's formulas."""

from __future__ import annotations

from typing import Any

from test_decoder import EXPERTS

PRODUCTS = {
    "qkv", "scores", "out", "gate_up", "up", "down", "router", "experts", "shared_gate_up", "shared_down",
    "shared_gate", "head",
}  # fmt: skip
"""What `FlopCounterMode` counts; softmax, norms and the like are no products."""

FULL = {"num_hidden_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "qwen2": {},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 3},
    "starcoder2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1]},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
}
