"""Native generation with a real model: texts, end token, logprobs against a plain forward, layouts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from realflow.engines.fused import FusedDecoder
from realflow.engines.generate import NativeEngine, Prompt
from realflow.graph.types import Sampling
from realflow.layout import DeviceMesh, Layout
from realflow.models.causal import CausalModel, load_model
from realflow.models.paths import models_dir
from realflow.models.place import Place, groups_of

PATH = models_dir() / "smollm2-135m-instruct"


needs_model = pytest.mark.skipif(
    not (PATH / "config.json").is_file(), reason="smollm2-135m-instruct is not in the cache"
)


@pytest.mark.real_model
@needs_model
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


LAYOUTS = ("t2", "t3", "p2", "d2")


def two_answers(model: CausalModel, dp: int = 0, replicas: int = 1) -> dict[str, torch.Tensor]:
    """Ten tokens after each of two prompts: `<sample>` and `<sample>/logprobs`."""
    engine = NativeEngine(
        model, Sampling(max_new_tokens=10), slots=4, max_length=64, seed=1, eos_ids=(), tokenizer=None
    )
    prompts = [Prompt(g, (2 * g, 2 * g + 1), tuple(range(300 + 50 * g, 320 + 50 * g))) for g in range(2)]
    engine.feed(prompts[dp::replicas])
    found = {}
    while engine.busy:
        for sample in engine.step():
            found[f"{sample.sample_id}"] = sample.tokens
            found[f"{sample.sample_id}/logprobs"] = sample.logprobs
    return found


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    meshes = [DeviceMesh(tuple(range(layout.size)), layout) for layout in map(Layout.parse, LAYOUTS)]
    needed = sorted({group for mesh in meshes for group in groups_of(mesh)})
    groups = {ranks: dist.new_group(list(ranks)) for ranks in needed}
    for name, mesh in zip(LAYOUTS, meshes, strict=True):
        if rank in mesh.ranks:
            place = Place.of(mesh, rank, groups)
            model = load_model(PATH, dtype="float64", place=place)
            save_file(two_answers(model, place.dp.index, place.dp.size), folder / f"{name}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.full
@pytest.mark.real_model
@needs_model
def test_smollm2_draws_the_same_tokens_under_every_layout(tmp_path) -> None:
    """Uneven heads (4 and 5, t2), whole key heads (t3), stages with a tied embedding (p2)."""
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(worker, (tmp_path,), nprocs=3)
    expected = two_answers(load_model(PATH, dtype="float64"))
    for name in LAYOUTS:
        found: dict[str, torch.Tensor] = {}
        for path in sorted(tmp_path.glob(f"{name}.*")):
            found |= load_file(path)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            if key.endswith("logprobs"):
                torch.testing.assert_close(found[key], tensor, atol=1e-8, rtol=0)
            else:
                assert torch.equal(found[key], tensor), (name, key)
