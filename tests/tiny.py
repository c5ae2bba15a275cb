"""Tiny random models and a tiny tokenizer, saved as real checkpoints (a few milliseconds each).

    path = tiny_model(tmp_path / "model", family="qwen3", dtype="float64", seed=1)

The tokenizer is exact: one token for each character of `CHARACTERS`, in order, after the special
tokens, so that tests can read token ids as text. It is a byte-level BPE without merges, because
`AutoTokenizer` rebuilds the tokenizers of some families (Qwen2) from vocabulary and merges alone.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

SPECIALS = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
CHARACTERS = string.digits + string.ascii_letters + " \n+-*/=?.,:;!()'\"[]{}<>_#$%&"
EOS = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

FAMILIES: Mapping[str, tuple[type[PreTrainedConfig], Mapping[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),  # biases on q, k and v
    "qwen3": (Qwen3Config, {"head_dim": 8}),  # norms on q and k
    "mistral": (MistralConfig, {"sliding_window": 8, "head_dim": 8}),  # every layer slides
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
}

OTHERS: Mapping[str, tuple[type[PreTrainedConfig], Mapping[str, Any]]] = {
    "starcoder2": (Starcoder2Config, {}),  # biases everywhere, layer norms, another MLP
    "granite": (GraniteConfig, {}),  # scales of embeddings, residuals, attention and logits
}


def tiny_tokenizer(vocab: int = 100) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab` ids: specials, then one id for each character, then unused ones.

    Other characters become `<unk>`s; `decode(encode(text)) == text` for text of `CHARACTERS`.
    """
    byte_level = {" ": "\u0120", "\n": "\u010a"}  # how byte-level vocabularies spell the two
    names = [*SPECIALS, *(byte_level.get(character, character) for character in CHARACTERS)]
    assert vocab >= len(names), f"the tiny tokenizer needs at least {len(names)} ids, not {vocab}"
    names += [f"<unused{index}>" for index in range(vocab - len(names))]
    ids = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(family: str = "llama", *, vocab: int = 100, tied: bool = True, **changes: Any) -> Any:
    """The configuration of a tiny model: 2 layers, hidden 32, 4 heads, 2 KV heads."""
    config, special = {**FAMILIES, **OTHERS}[family]
    values: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": SPECIALS.index(EOS),
    }
    return config(**{**values, **special, **changes})


def tiny_model(
    directory: Path,
    family: str = "llama",
    dtype: str = "float32",
    vocab: int = 100,
    seed: int = 0,
    *,
    tied: bool = True,
    scale: float = 5.0,
    **changes: Any,
) -> Path:
    """Save a random model of `family` (see `FAMILIES` and `OTHERS`) with its tokenizer; return `directory`.

    Matrices are drawn `scale` times larger than usual, so that the model is far from uniform;
    biases and norms are perturbed too, so that no parameter hides a mistake. `changes` are
    entries of the configuration (`num_hidden_layers=1`).
    """
    config = tiny_config(family, vocab=vocab, tied=tied, **changes)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.02 * scale)
            else:
                parameter.add_((noise * 0.1).to(parameter.dtype))
    model.save_pretrained(directory)
    tiny_tokenizer(vocab).save_pretrained(directory)
    return Path(directory)
