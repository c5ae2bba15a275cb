"""Decode steps in frames of tensors that stay: the same answers, and nothing that a graph cannot repeat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from realflow.engines.fused import FusedDecoder
from realflow.engines.generate import NativeEngine, Prompt
from realflow.engines.static import StaticDecoder, length_of, rows_of
from realflow.graph.types import Sampling
from realflow.models.causal import CausalModel, load_model

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, CausalModel]:
    folder = tmp_path_factory.mktemp("static")
    return {
        family: load_model(tiny_model(folder / family, family, "float64", seed=index), dtype="float64")
        for index, family in enumerate(FAMILIES)
    }


def engine_of(model: CausalModel, *, framed: bool, capture: bool = False, slots: int = 6) -> NativeEngine:
    engine = NativeEngine(
        model,
        Sampling(max_new_tokens=14),
        slots=slots,
        max_length=300,
        seed=2,
        eos_ids=(),
        tokenizer=None,
    )
    engine._decoder = FusedDecoder(model)
    if framed:
        engine._decoder = StaticDecoder(engine._decoder, engine._slots.groups, capture=capture)
    return engine


def drain(engine: NativeEngine, count: int = 7, longest: int = 280) -> dict:
    """Samples of prompts of very different lengths, twice the same ones: prefixes are kept and copied."""
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for index in range(count):
        size = (3, 20, longest)[index % 3]
        tokens = tuple(torch.randint(0, 97, (size,), generator=generator).tolist())
        limits = tuple(torch.randint(1, 15, (2,), generator=generator).tolist())
        prompts.append(Prompt(index, (2 * index, 2 * index + 1), tokens, limits))
    engine.feed(prompts)
    engine.feed([Prompt(100 + p.group_id, tuple(i + 100 for i in p.sample_ids), p.tokens) for p in prompts])
    done = {}
    while engine.busy:
        done |= {sample.sample_id: sample for sample in engine.step()}
    return done


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_draw_the_same_tokens(models, family) -> None:
    expected = drain(engine_of(models[family], framed=False))
    engine = engine_of(models[family], framed=True)
    found = drain(engine)
    assert found.keys() == expected.keys()
    for key, sample in expected.items():
        assert torch.equal(found[key].tokens, sample.tokens)
        torch.testing.assert_close(found[key].logprobs, sample.logprobs, atol=1e-10, rtol=0)
    sizes = {(rows, longest) for _, rows, longest in engine._decoder.frames}
    assert {(6, 256), (6, 300)} <= sizes
    assert len(sizes) <= 8


class Watch(TorchDispatchMode):
    """The operations on tensors, and the sizes and places that are not made in between."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        numbers = [a for a in args if isinstance(a, int | float | bool)]
        self.calls.append((str(func), shapes, numbers))
        return out


HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_makes_the_same_operations_whatever_is_in_it(models, family) -> None:
    """What capture needs: no data that goes to the host, no tensor made from the host's numbers."""
    engine = engine_of(models[family], framed=True)
    with torch.inference_mode():
        drain(engine)
        frame = next(
            f for (_, rows, length), f in engine._decoder.frames.items() if (rows, length) == (6, 256)
        )
        seen = []
        for lengths in ([3, 4, 5, 6, 7, 8], [250, 1, 80, 9, 9, 30]):
            frame.static.lengths.copy_(torch.tensor(lengths))
            frame.static.positions.copy_(torch.tensor(lengths) - 1)
            frame.static._places.copy_(torch.tensor(lengths) - 1)
            frame.static.tokens.copy_(torch.tensor(lengths) % 97)
            with Watch() as watch:
                frame.compute()
            seen.append(watch.calls)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 50
    names = {name for name, *_ in seen[0]}
    assert not [name for name in names if any(word in name for word in HOST)]
    with Watch() as watch:  # the control
        bool(torch.ones(2).isfinite().all())
    assert any(word in name for name, *_ in watch.calls for word in HOST)


def test_frames_are_made_again_when_weights_or_cache_move(models) -> None:
    model = models["llama"]
    engine = engine_of(model, framed=True)
    before = drain(engine)
    frames = set(engine._decoder.frames.values())
    storage = model.flat.storage.clone()
    kept = {name: parameter.data for name, parameter in model.module.named_parameters()}
    for name, slot in model.flat.slots.items():
        moved = storage[slot.offset : slot.offset + slot.size].view(slot.shape)
        dict(model.module.named_parameters())[name].data = moved
    engine.set_version(1)
    after = drain(engine)
    assert not frames & set(engine._decoder.frames.values())
    assert all(torch.equal(after[key].tokens, before[key].tokens) for key in before)
    for name, parameter in model.module.named_parameters():
        parameter.data = kept[name]


def test_a_step_asks_one_parameter_where_the_weights_are(models, monkeypatch) -> None:
    """Not all of them, of which a model has hundreds."""
    model = models["qwen3"]
    engine = engine_of(model, framed=True)
    expected = drain(engine)
    asked = []
    monkeypatch.setattr(model.module, "parameters", lambda *_: asked.append(1) or iter(()))
    found = drain(engine)
    assert not asked and found.keys() == expected.keys()
    list(model.module.parameters())
    assert asked, "the control"


@given(st.integers(1, 400), st.integers(0, 300), st.integers(1, 5000), st.integers(0, 5000))
def test_frames_are_few_and_large_enough(count, spare, longest, rest) -> None:
    assert count <= rows_of(count, count + spare) <= count + spare
    assert rows_of(count, 10_000) < 2 * count + 8
    assert longest <= length_of(longest, longest + rest) <= longest + rest
    assert len({rows_of(c, 64) for c in range(1, 65)}) <= 11


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_draw_the_same_tokens(models, family) -> None:
    model = load_model(models[family].source, dtype="float64", device="cuda")
    expected = drain(engine_of(model, framed=False))
    engine = engine_of(model, framed=True, capture=True)
    found = drain(engine)
    assert all(frame.output is not None for frame in engine._decoder.frames.values())
    for key, sample in expected.items():
        assert torch.equal(found[key].tokens, sample.tokens)
