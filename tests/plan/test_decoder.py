"""What is read from a Hugging Face config alone, against the modules that transformers builds of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.decoder import read_decoder, stage_cuts
from planner.families import FAMILIES
from realflow.errors import InputError
from realflow.models.partition import stages, with_head
from realflow.models.paths import find_model

PUBLISHED = Path(__file__).parents[2] / "experiments" / "planner" / "models"
SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 3,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("mistral", {"head_dim": 8}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {}),
    ("qwen2", SLIDING),
    ("qwen3", {}),
    ("qwen3", {"head_dim": 8, "attention_bias": True, **SLIDING}),
    ("gemma", {"head_dim": 8}),
    ("gemma2", {}),
    ("gemma2", {"head_dim": 8, "sliding_window": 16}),
    ("gemma3_text", {"head_dim": 8, "sliding_window_pattern": 3}),
    ("gemma3_text", {"head_dim": 8, "layer_types": ["full_attention"] * 4 + ["sliding_attention"]}),
    ("phi3", {"sliding_window": 8}),
    ("starcoder2", {}),
    ("starcoder2", {"use_bias": False, "sliding_window": 9}),
    ("granite", {}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24, **SLIDING, "qkv_bias": False}),
    ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0, 3], "head_dim": 8}),
    ("qwen3_moe", {**EXPERTS, **SLIDING}),
]


def published(name: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PUBLISHED / f"{name}.json").read_text())
    return config | changes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_sizes_are_those_of_the_card(
    tmp_path: Path, family: str, changes: dict[str, Any], tied: bool
) -> None:
    """From the keys that a published config has, and from all that transformers writes."""
    from transformers import AutoConfig

    from realflow.models.card import build

    given = {"model_type": family, **SMALL, **changes, "tie_word_embeddings": tied}
    config = AutoConfig.for_model(**given)
    config.save_pretrained(tmp_path)
    card = build(tmp_path)
    for values in (given, json.loads((tmp_path / "config.json").read_text())):
        decoder = read_decoder(values)
        assert decoder.size == card.size
        assert (decoder.tied, decoder.assumed) == (tied, ())
        found = (len(decoder.layers), decoder.hidden, decoder.heads, decoder.kv_heads, decoder.head_dim)
        assert found == (card.layers, card.hidden, card.heads, card.kv_heads, card.head_dim)
        assert (decoder.vocab, decoder.max_positions) == (card.vocab, card.max_positions)
        assert read_decoder(values, "value").size == with_head(card, "value").size
    assert family in FAMILIES


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_windows_are_those_of_the_masks(family: str, changes: dict[str, Any]) -> None:
    """How many of 20 keys the last query sees, in the mask that each layer's attention is given."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
    from transformers.masking_utils import eager_mask

    seen: list[int] = []

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
        seen.append(int((mask[0, 0, -1] == 0).sum()))
        return query.transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", eager_mask)
    given = {"model_type": family, **SMALL, **changes}
    config = AutoConfig.for_model(**given)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="spy")
    with torch.no_grad():
        model(torch.arange(5, 25)[None], use_cache=False)
    assert seen == [min(20, layer.window or 20) for layer in read_decoder(given).layers]


@pytest.mark.real_model
def test_the_real_model() -> None:
    folder = find_model("smollm2-135m-instruct")
    if folder is None:
        pytest.skip("SmolLM2 is not in the cache")
    decoder = read_decoder(json.loads((folder / "config.json").read_text()), "lm")
    assert decoder.size == 134_515_008 and decoder.dtype == "bfloat16"
    assert (decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.tied) == (9, 3, 64, True)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("mixtral-8x7b", 46_702_792_704),
        ("gemma-2-9b", 9_241_705_984),
        ("qwen3-235b-a22b", 235_093_634_560),
    ],
)
def test_sizes_of_published_models(name: str, size: int) -> None:
    """The numbers of parameters of their checkpoints."""
    assert read_decoder(published(name)).size == size


def test_active_parameters_of_a_mixture() -> None:
    decoder = read_decoder(published("qwen3-235b-a22b"))
    active = sum(decoder.layer_size(kind, active=True) * n for kind, n in decoder.kinds().items())
    assert round((active + 2 * decoder.embedding_size) / 1e9) == 22, "its name says A22B"
    assert decoder.sparse and decoder.layers[0].experts == 128


def test_kinds_count_layers_that_are_alike() -> None:
    decoder = read_decoder(published("gemma-2-9b"))
    assert decoder.kinds() == {0: 21, 1: 21} and decoder.windows == (4096,)
    assert decoder.kinds(1, 4) == {1: 2, 0: 1}
    assert decoder.layers[0].window == 4096 and decoder.layers[1].window is None
    assert decoder == read_decoder(published("gemma-2-9b")) and hash(decoder) == hash(
        read_decoder(published("gemma-2-9b"))
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("head", ["lm", "value"])
def test_stages_are_those_of_the_engine(tmp_path: Path, family: str, tied: bool, head: Any) -> None:
    from transformers import AutoConfig

    from realflow.models.card import build

    AutoConfig.for_model(
        family, **SMALL | {"num_hidden_layers": 9}, tie_word_embeddings=tied
    ).save_pretrained(tmp_path)
    card = with_head(build(tmp_path), head)
    decoder = read_decoder(json.loads((tmp_path / "config.json").read_text()), head)
    for count in range(1, 10):
        assert stage_cuts(decoder, count) == tuple((s.first, s.stop) for s in stages(card, count))


def test_a_family_that_is_not_known_is_taken_for_llama_like() -> None:
    config = published("llama-3-8b", model_type="newcomer")
    decoder = read_decoder(config)
    assert decoder.size == read_decoder(published("llama-3-8b")).size
    (said,) = decoder.assumed
    assert "newcomer" in said and "Llama-like" in said
    names = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64, "vocab_size": 100}
    other = read_decoder({"model_type": "newcomer", **names})
    assert (other.hidden, len(other.layers), other.kv_heads, other.max_positions) == (32, 2, 4, 64)


def test_the_text_part_of_a_config_is_read() -> None:
    text = published("gemma-2-9b")
    both = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    decoder = read_decoder(both)
    assert decoder.size == read_decoder(text).size and "language model" in decoder.assumed[0]


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"hidden_size": None}, "hidden_size", "missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "at least 1"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers", "'many'"),
        ({"num_attention_heads": True}, "num_attention_heads", "True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "does not divide"),
        ({"vocab_size": -5}, "vocab_size", "-5"),
        ({"intermediate_size": 1.5}, "intermediate_size", "1.5"),
        ({"max_position_embeddings": None}, "max_position_embeddings", "missing"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings", "true or false"),
        ({"torch_dtype": "int4"}, "dtype", "int4"),
        ({"model_type": None}, "model_type", "llama"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types", "1 layers"),
        ({"model_type": "qwen2", "layer_types": "full"}, "layer_types", "a list"),
        (
            {"model_type": "newcomer", "layer_types": ["linear_attention"] * 32},
            "layer_types",
            "linear_attention",
        ),
        (
            {"model_type": "newcomer", "layer_types": ["sliding_attention"] * 32},
            "sliding_window",
            "missing",
        ),
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_experts_per_tok", "missing"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok",
            "2 experts",
        ),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "kv_lora_rank", "latent attention"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_decoder(published("llama-3-8b", **changes), file="mine/config.json")
    (problem,) = caught.value.problems
    assert problem.where == key and said in problem.message and problem.file == "mine/config.json"


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        read_decoder({"model_type": "llama"})
    keys = {problem.where for problem in caught.value.problems}
    assert {"hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"} <= keys


def test_reading_imports_neither_torch_nor_sympy() -> None:
    script = (
        "import sys, planner.decoder, planner.formulas; "
        "print([name for name in ('torch', 'transformers', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
