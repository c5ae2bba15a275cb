"""Native generation with a real model: texts, end token, logprobs against a plain forward."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from realflow.engines.fused import FusedDecoder
from realflow.engines.generate import NativeEngine, Prompt
from realflow.graph.types import Sampling
from realflow.models.causal import load_model
from realflow.models.paths import models_dir

PATH = models_dir() / "smollm2-135m-instruct"


@pytest.mark.real_model
@pytest.mark.skipif(not (PATH / "config.json").is_file(), reason="smollm2-135m-instruct is not in the cache")
def test_smollm2_knows_its_logprobs():
    model, tokenizer = load_model(PATH, dtype="float32"), AutoTokenizer.from_pretrained(PATH)
    questions = ("What is the capital of France?", "What is 2 + 3?")
    chats = [[{"role": "user", "content": text}] for text in questions]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    engine = NativeEngine(
        model,
        Sampling(max_new_tokens=12, temperature=0.7),
        slots=3,
        max_length=128,
        seed=1,
        eos_ids=(tokenizer.eos_token_id,),
        tokenizer=tokenizer,
    )
    assert isinstance(engine._decoder, FusedDecoder)
    engine.feed(Prompt(g, (2 * g, 2 * g + 1), tuple(tokens)) for g, tokens in enumerate(prompts))
    done = {}
    while engine.busy:
        done |= {sample.sample_id: sample for sample in engine.step()}
    assert len({sample.completion for sample in done.values()}) == 4

    plain = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32)
    for sample in done.values():
        with torch.no_grad():
            logprobs = (plain(sample.tokens[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        expected = logprobs.gather(-1, sample.tokens[1:, None])[:, 0]
        mask = sample.loss_mask
        torch.testing.assert_close(sample.logprobs[mask], expected[mask[1:]], atol=1e-4, rtol=0)
        ended = int(sample.tokens[-1]) == tokenizer.eos_token_id
        assert sample.finish_reason == ("stop" if ended else "length")
