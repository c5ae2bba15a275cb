"""Adapters: drawn, cut, merged, saved and decoded as peft does it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_cards import llama_card
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from realflow.engines.decode import ModuleDecoder
from realflow.engines.fused import FusedDecoder, is_fusible
from realflow.engines.generate import NativeEngine, Prompt
from realflow.errors import InputError
from realflow.graph.types import LoraSpec, Sampling
from realflow.layout import Box, Layout
from realflow.models.adapters import A, AdapterCut, B, adapter_cut
from realflow.models.causal import CausalModel, load_model
from realflow.models.lora import PREFIX, WEIGHTS, AdapterSource, initial, merged
from realflow.models.partition import partition
from realflow.models.save import save_model
from realflow.models.savelora import save_adapters

SPEC = LoraSpec(4, 6.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model (`model`) and adapters that peft made for it (`adapters`), both far from zero."""
    folder = tmp_path_factory.mktemp("lora")
    tiny_model(folder / "model", "qwen2", "float64", seed=5)
    adapted = get_peft_model(
        plain(folder / "model"),
        LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    adapted.save_pretrained(folder / "adapters")
    return folder


def plain(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def loaded(folder: Path, *, merged: bool = False, dtype: str = "float64") -> CausalModel:
    source = AdapterSource(SPEC, folder=folder / "adapters", merged=merged)
    return load_model(folder / "model", dtype=dtype, adapters=source)


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*span) for span in box)


# ---------------------------------------------------------------- what each rank holds


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(8, 2), (4, 4), (6, 3), (9, 3), (4, 1)]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([(), ("q_proj", "v_proj"), ("o_proj",), ("down_proj", "k_proj")]),
    st.integers(1, 5),
)
def test_the_boxes_of_adapters_make_the_boxes_of_their_layers(
    heads: tuple[int, int], tp: int, pp: int, targets: tuple[str, ...], rank: int
) -> None:
    """On every rank W + B A of what it holds is its box of the whole; what is not whole is held once."""
    card = llama_card(3, heads[0] * 4, *heads)
    cut = adapter_cut(partition(card, Layout(tp=tp, pp=pp)), LoraSpec(rank, 2.0, targets))
    generator = torch.Generator().manual_seed(rank)
    values = {name: torch.rand(shape, generator=generator) for name, shape in cut.shapes.items()}
    held: dict[str, list[Box]] = {name: [] for name in values}
    for stage in range(pp):
        for index in range(tp):
            boxes = cut.boxes(stage, index)
            for name, box in boxes.items():
                held[name].append(box)
            for layer in (name.removesuffix(A) for name in boxes if name.endswith(A)):
                weight = cut.base.boxes(stage, index)[f"{layer}.weight"]
                a, b = (values[name][slices(boxes[name])] for name in (layer + A, layer + B))
                whole = values[layer + B] @ values[layer + A]
                torch.testing.assert_close(b @ a, whole[slices(weight)], rtol=1e-5, atol=1e-6)
    for name, boxes in held.items():
        assert len(boxes) == tp, name  # one stage has it
        count = torch.zeros(cut.shapes[name])
        for box in boxes:
            count[slices(box)] += 1
        assert (count == (tp if cut.is_whole(name) else 1)).all(), name
    partial = {name for name in values if cut.is_whole(name)} if tp > 1 else set()
    assert set(cut.partial()) == partial and cut.tied == ()
    assert cut.size == sum(value.numel() for value in values.values())


def test_targets_that_a_model_lacks_are_refused() -> None:
    whole = partition(llama_card(), Layout())
    assert len(adapter_cut(whole, LoraSpec(2, 2.0, ("q_proj", "v_proj"))).layers) == 2 * whole.card.layers
    with pytest.raises(InputError, match="no linear layer query or lm_head; expected some of down_proj"):
        adapter_cut(whole, LoraSpec(2, 2.0, ("query", "q_proj", "lm_head")))


# ---------------------------------------------------------------- values


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 9), st.integers(1, 40))
def test_first_values_are_what_peft_draws(seed: int, rank: int, width: int) -> None:
    """From the same state of torch's generator, which here depends on seed and name alone."""
    from peft.tuners.lora import Linear

    name = f"model.layers.1.self_attn.q_proj{A}"
    layer = Linear(nn.Linear(width, 7), "default", LoraConfig(r=rank), r=rank, lora_alpha=1)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        layer.reset_lora_parameters("default", True)
    found = initial(name, (rank, width), seed)
    assert torch.equal(found, layer.lora_A["default"].weight)
    assert found.abs().max() <= width**-0.5
    assert not initial(name.replace(A, B), (7, rank), seed).any()
    assert not torch.equal(found, initial(name, (rank, width), seed + 1))


def test_a_new_adapter_changes_nothing(folder: Path) -> None:
    model = load_model(folder / "model", dtype="float64", adapters=AdapterSource(SPEC, seed=3))
    base = load_model(folder / "model", dtype="float64")
    for name in base.flat.slots:
        assert torch.equal(model.weight(name), base.flat.view(name)), name
    assert model.adapters is not None and model.adapters.flat.storage[len(base.flat.storage) :].any()
    wanting = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert len(wanting) == len(model.trained.parameters) and all("lora_" in name for name in wanting)


def test_merged_weights_are_those_of_peft(folder: Path) -> None:
    model, whole = loaded(folder), PeftModel.from_pretrained(plain(folder / "model"), folder / "adapters")
    expected = dict(whole.merge_and_unload().named_parameters())
    at_once = loaded(folder, merged=True)
    assert at_once.adapters is None
    for name in model.flat.slots:
        torch.testing.assert_close(model.weight(name), expected[name].data, rtol=0, atol=1e-14)
        torch.testing.assert_close(at_once.flat.view(name), expected[name].data, rtol=0, atol=1e-14)
    name = "model.layers.1.mlp.down_proj.weight"
    part = ((3, 20), (7, 31))
    torch.testing.assert_close(model.weight(name, part), model.weight(name)[slices(part)], rtol=0, atol=1e-14)
    assert (model.weight(name) - model.flat.view(name)).abs().max() > 1e-2  # the control: not the base


def test_merging_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((9, 40), (3, 40), (9, 3))
    )
    found = merged(weight, a, b, 0.37)
    exact = weight.double() + 0.37 * b.double() @ a.double()
    assert found.dtype == torch.bfloat16
    assert (found != exact.bfloat16()).float().mean() < 0.01  # but for ties, which float32 may turn
    assert (weight + 0.37 * (b @ a) != exact.bfloat16()).any()  # the control: rounded on the way


# ---------------------------------------------------------------- files


def test_what_is_saved_loads_with_peft(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    sums = save_adapters(model, None, tmp_path / "saved")
    assert set(sums) == {WEIGHTS, "adapter_config.json", "checksums.json"}
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() == {PREFIX + name for name in model.trained.slots}
    again = PeftModel.from_pretrained(plain(folder / "model"), tmp_path / "saved")
    first = PeftModel.from_pretrained(plain(folder / "model"), folder / "adapters")
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        logits = [one(tokens).logits for one in (again, first, plain(folder / "model"))]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-10)
    assert (logits[0] - logits[2]).abs().max() > 1e-2
    # transformers finds the base by what the adapter's config says
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "model") and config["r"] == 4
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(direct(tokens).logits, logits[1], rtol=0, atol=1e-6)


def test_the_whole_model_saved_has_its_adapters_merged(folder: Path, tmp_path: Path) -> None:
    save_model(loaded(folder), None, tmp_path / "whole")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float64).state_dict()
    whole = PeftModel.from_pretrained(plain(folder / "model"), folder / "adapters").merge_and_unload()
    expected = whole.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-14)


def test_adapters_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    def load(spec: LoraSpec, path: Path) -> None:
        load_model(folder / "model", dtype="float64", adapters=AdapterSource(spec, folder=path))

    with pytest.raises(InputError, match=r"another rank or for other layers: .* \[4, .*expected \[3, "):
        load(LoraSpec(3, 6.0), folder / "adapters")
    with pytest.raises(InputError, match=r"other layers: .*expected none"):
        load(LoraSpec(4, 6.0, ("q_proj",)), folder / "adapters")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: cannot be read"):
        load(SPEC, tmp_path)


# ---------------------------------------------------------------- generation


def generated(model: CausalModel, *, modules: bool = False) -> dict[int, list[int]]:
    engine = NativeEngine(
        model,
        Sampling(max_new_tokens=12, temperature=0.0),
        slots=3,
        max_length=64,
        seed=1,
        eos_ids=(),
        tokenizer=None,
    )
    if modules:
        engine._decoder = ModuleDecoder(model)
    engine.feed([Prompt(i, (i,), tuple(range(4 + i, 9 + 3 * i))) for i in range(4)])
    found = {}
    while engine.busy:
        found.update({one.sample_id: one for one in engine.step()})
    return {key: one.tokens.tolist() for key, one in found.items()}


def test_merged_and_active_adapters_generate_what_peft_merged_generates(folder: Path) -> None:
    """Token by token, greedy, in float64: with weights merged as they move, and where nothing moves."""
    whole = PeftModel.from_pretrained(plain(folder / "model"), folder / "adapters").merge_and_unload().eval()
    active = loaded(folder)
    receiver = load_model(folder / "model", dtype="float64")
    for name in receiver.flat.slots:
        receiver.flat.view(name).copy_(active.weight(name))
    assert is_fusible(active.module) and isinstance(engine_decoder(active), FusedDecoder)
    expected = {}
    for i in range(4):
        prompt = torch.arange(4 + i, 9 + 3 * i)[None]
        tokens = whole.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        expected[i] = tokens[0].tolist()
    for name, found in {
        "moved": generated(receiver),
        "loaded": generated(loaded(folder, merged=True)),
        "active": generated(active),
        "modules": generated(active, modules=True),
    }.items():
        assert {key: tokens[-12:] for key, tokens in found.items()} == {
            key: tokens[-12:] for key, tokens in expected.items()
        }, name
    assert generated(load_model(folder / "model", dtype="float64")) != generated(active)  # the control


def engine_decoder(model: CausalModel) -> object:
    return NativeEngine(
        model, Sampling(max_new_tokens=2), slots=1, max_length=8, seed=1, eos_ids=(), tokenizer=None
    )._decoder


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_written_out_adapters_equal_the_modules_in_bfloat16(family: str, tmp_path: Path) -> None:
    """The same numbers, rounded in the same places."""
    tiny_model(tmp_path / "model", family, "bfloat16", seed=4)
    model = load_model(tmp_path / "model", dtype="bfloat16", adapters=AdapterSource(LoraSpec(4, 8.0), seed=2))
    assert model.adapters is not None
    for name in model.trained.slots:
        if name.endswith(B):
            model.adapters.flat.view(name).normal_(0, 0.1, generator=torch.Generator().manual_seed(7))
    assert generated(model) == generated(model, modules=True)


def test_cut_is_for_all_layers_without_targets() -> None:
    cut = adapter_cut(partition(llama_card(), Layout()), SPEC)
    assert isinstance(cut, AdapterCut)
    assert {layer.rpartition(".")[2] for layer in cut.layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
