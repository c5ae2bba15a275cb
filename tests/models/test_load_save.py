"""The flat buffer, loading, and checkpoints that are whole or absent."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, OTHERS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from realflow.errors import InputError
from realflow.models.causal import load_model, master_values
from realflow.models.flat import FlatBuffer, slots_of
from realflow.models.heads import values
from realflow.models.save import save_model


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=3), max_size=8), st.integers(1, 5))
def test_slots_and_pieces_cover_every_element_once(shapes: list[list[int]], parts: int) -> None:
    slots, total = slots_of({f"p{index}": tuple(shape) for index, shape in enumerate(shapes)})
    seen = torch.zeros(total)
    for slot in slots.values():
        assert slot.offset % 32 == 0
        seen[slot.offset : slot.offset + slot.size] += 1
    assert bool((seen <= 1).all())
    assert int(seen.sum()) == sum(slot.size for slot in slots.values())
    flat = FlatBuffer(torch.zeros(total), slots)
    chunk = -(-total // parts)
    for rank in range(parts):
        for name, first, last in flat.pieces(rank * chunk, (rank + 1) * chunk):
            seen[slots[name].offset + first : slots[name].offset + last] -= 1
    assert not seen.any()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fused_weights_are_adjacent_views(tmp_path: Path, family: str) -> None:
    model = load_model(tiny_model(tmp_path, family), dtype="bfloat16")
    attention = model.module.model.layers[1].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    kinds = ["weight", "bias"] if family == "qwen2" else ["weight"]
    for kind in kinds:
        tensors = [getattr(part, kind) for part in parts]
        start = model.flat.slots[f"model.layers.1.self_attn.q_proj.{kind}"].offset
        fused = model.flat.storage[start : start + sum(t.numel() for t in tensors)]
        assert torch.equal(fused, torch.cat([t.detach().flatten() for t in tensors]))
    model.flat.storage.fill_(3)
    assert all(bool((p == 3).all()) for p in model.module.parameters())
    names = list(model.flat.slots)
    assert len(names) == len(set(names)) and "lm_head.weight" not in names  # tied: once


def test_flat_ranges_do_not_depend_on_the_dtype(tmp_path: Path) -> None:
    path = tiny_model(tmp_path)
    slots = [load_model(path, dtype=dtype).flat.slots for dtype in ("bfloat16", "float32", "float64")]
    assert slots[0] == slots[1] == slots[2]


def test_masters_have_the_precision_of_the_checkpoint(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, dtype="float32")
    model, wide = load_model(path, dtype="bfloat16"), load_model(path, dtype="float32")
    start, stop = 1000, 5000
    masters = master_values(model, start, stop, torch.float32)
    assert len(list(model.flat.pieces(start, stop))) > 3
    assert torch.equal(masters, wide.flat.storage[start:stop])
    assert not torch.equal(masters, model.flat.storage[start:stop].float())


def test_a_saved_model_loads_with_hugging_face_alone(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path / "start", "qwen3"), dtype="bfloat16")
    with torch.no_grad():
        model.flat.storage.mul_(1.5)
    save_model(model, tiny_tokenizer(), tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert plain.dtype == torch.bfloat16 and plain.config._attn_implementation != "realflow_packed"
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.flat.view(name)), name
    text = "12+3=15\n"
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved")(text)["input_ids"]
        == tiny_tokenizer()(text).input_ids
    )
    assert "realflow_packed" not in (tmp_path / "saved/config.json").read_text()
    save_model(model, None, tmp_path / "saved")  # replaces what is there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved", "start"]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_model(tmp_path / "start"), dtype="float32")
    save_model(model, None, tmp_path / "saved")
    before = (tmp_path / "saved/checksums.json").read_text()
    monkeypatch.setattr("realflow.models.save.save_file", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        save_model(model, None, tmp_path / "saved")
    assert (tmp_path / "saved/checksums.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved", "start"]


def test_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path / "start"), dtype="float32")
    sums = save_model(model, None, tmp_path / "saved")
    files = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / "saved").iterdir()
    }
    assert sums == files
    del files["checksums.json"]
    assert json.loads((tmp_path / "saved/checksums.json").read_text()) == files


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path, dtype="float32")
    path = tiny_model(tmp_path / "m")
    with pytest.raises(InputError, match="float16"):
        load_model(path, dtype="float16")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match="lacks 9 tensors"):
        load_model(path, dtype="float32")


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_modules_are_those_of_from_pretrained(tmp_path: Path, family: str, dtype: str) -> None:
    """Also what no checkpoint holds: rotary frequencies, scales; and how to generate."""
    path = tiny_model(tmp_path, family)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    plain.generation_config.max_new_tokens = 77
    plain.generation_config.save_pretrained(path)
    module = load_model(path, dtype=dtype).module
    ours, theirs = dict(module.named_buffers()), dict(plain.named_buffers())
    assert ours.keys() == theirs.keys() and len(ours) > 0
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    ours, theirs = dict(module.named_parameters()), dict(plain.named_parameters())
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not module.training and module.generation_config.max_new_tokens == 77


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_of_other_forms_load(tmp_path: Path, tied: bool) -> None:
    path = tiny_model(tmp_path / "start", tied=tied)
    expected = load_model(path, dtype="float32").flat.storage
    plain = AutoModelForCausalLM.from_pretrained(path)
    plain.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(load_model(tmp_path / "shards", dtype="float32").flat.storage, expected)
    tensors = load_file(path / "model.safetensors")
    if tied:  # under the head's name alone, and without the base's prefix
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, path / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(path, dtype="float32").flat.storage, expected)
    (path / "other.safetensors").write_bytes(b"not read")
    load_model(path, dtype="float32")


def test_heads_are_read_started_from_zeros_or_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "lm")
    value = load_model(path, dtype="float32", head="value")
    assert not value.flat.view("score.weight").any() and value.head_kind == "value"
    states = value.run(value.prepare(torch.arange(5), torch.arange(5), torch.tensor([0, 5]).int()))
    assert values(value, states).tolist() == [0.0] * 5
    with pytest.raises(InputError, match=r"lacks 1 tensors, such as score\.weight"):
        load_model(path, dtype="float32", head="reward")
    classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    torch.nn.init.normal_(classifier.score.weight)
    classifier.save_pretrained(tmp_path / "reward")
    reward = load_model(tmp_path / "reward", dtype="float32", head="reward")
    packed = reward.prepare(torch.arange(5), torch.arange(5), torch.tensor([0, 5]).int())
    found = values(reward, reward.run(packed))
    expected = classifier(torch.arange(5)[None]).logits[0, 0]
    torch.testing.assert_close(found[-1], expected)
    save_model(reward, None, tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(again(torch.arange(5)[None]).logits[0, 0], expected)
    AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(InputError, match=r"shape \[3, 32\]; one label needs \[1, 32\]"):
        load_model(tmp_path / "three", dtype="float32", head="reward")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer_types": ["full_attention", "conv"], "model_type": "lfm2"},
            "kind Conv1d, which mix the tokens",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"hidden_size": 64}, r"shape \[100, 32\]; its config asks for \[100, 64\]"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tiny_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        load_model(path, dtype="float32")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    for content in (b"", b"no safetensors at all", whole[: len(whole) // 2]):
        (path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as safetensors"):
            load_model(path, dtype="float32")
    (path / "model.safetensors").unlink()
    for index in ("", "[]", '{"weight_map": 3}'):
        (path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(InputError, match="is no index of a checkpoint"):
            load_model(path, dtype="float32")


def test_a_model_that_changes_its_logits_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "gemma3", final_logit_softcapping=5.0)
    with pytest.raises(InputError, match="soft cap"):
        load_model(path, dtype="float32")
