"""The helpers that other tests stand on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHARACTERS, FAMILIES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


@given(st.text(alphabet=CHARACTERS, max_size=60))
def test_the_tokenizer_is_exact(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_tiny_checkpoint_loads(tmp_path, family: str) -> None:
    path = tiny_model(tmp_path / family, family=family)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert ids.max() < 100 and len(tokenizer("1+1?", add_special_tokens=False).input_ids) == 4
    assert tokenizer.decode(ids[0]).endswith("assistant\n")
    assert model(ids).logits.isfinite().all()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model(ids).logits.dtype == torch.float32
