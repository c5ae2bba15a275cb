"""The native engine against Hugging Face, whatever the slots, the batch and the path."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cards import llama_card
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig

from realflow.engines.decode import ModuleDecoder
from realflow.engines.fused import FusedDecoder, adjacent, is_fusible
from realflow.engines.generate import Finished, NativeEngine, Prompt
from realflow.errors import InputError
from realflow.graph.types import Sampling
from realflow.layout import Layout
from realflow.models.causal import CausalModel, load_model
from realflow.models.partition import Partition, Stage, partition
from realflow.models.place import Place
from realflow.models.precision import full_precision
from realflow.models.tensor import Region

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")


@dataclass(frozen=True)
class Bare:
    """A model that is not in a flat buffer."""

    module: torch.nn.Module
    place: Place = field(default_factory=Place.alone)
    region: Region = field(default_factory=lambda: Region(Place.alone().tp))

    @property
    def partition(self) -> Partition:
        config = self.module.config
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        card = llama_card(layers, heads * size, heads, config.num_key_value_heads)
        return partition(card, Layout())

    @property
    def stage(self) -> Stage:
        return self.partition.stages[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, CausalModel]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for index, family in enumerate(FAMILIES):
        path = tiny_model(folder / family, family, "float64", seed=index, tied=index % 2 == 0)
        made[family] = load_model(path, dtype="float64")
    return made


@pytest.fixture(scope="module")
def tokenizer(models):
    return AutoTokenizer.from_pretrained(models["llama"].source)


def make(model, *, slots=4, max_length=64, seed=3, eos_ids=(), tokenizer=None, module_path=False, **sampling):
    engine = NativeEngine(
        model,
        Sampling(**{"max_new_tokens": 12, **sampling}),
        slots=slots,
        max_length=max_length,
        seed=seed,
        eos_ids=eos_ids,
        tokenizer=tokenizer,
    )
    if module_path:
        engine._decoder = ModuleDecoder(model)
    return engine


def prompts_of(count: int, samples: int = 1, seed: int = 0, varied: bool = False) -> list[Prompt]:
    """Prompts of 1 to 34 tokens, most with a begin that others share to some place.

    With `varied` each sample has a length limit of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    begin = torch.randint(0, 97, (20,), generator=generator).tolist()
    for group in range(count):
        shared, size = torch.randint(1, 21, (2,), generator=generator).tolist()
        own = torch.randint(0, 97, (1 + size * 14 // 21,), generator=generator).tolist()
        tokens = (begin[:shared] if group % 4 else []) + own
        ids = tuple(range(group * samples, (group + 1) * samples))
        limits = torch.randint(1, 13, (samples,), generator=generator).tolist()
        made.append(Prompt(group, ids, tuple(tokens), tuple(limits) if varied else None))
    return made


def drain(engine: NativeEngine, prompts: list[Prompt]) -> dict[int, Finished]:
    engine.feed(prompts)
    done: dict[int, Finished] = {}
    while engine.busy:
        for sample in engine.step():
            assert sample.sample_id not in done
            done[sample.sample_id] = sample
    return done


def hugging_face_logprobs(model, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log p(tokens[i] | tokens[:i]), entry 0 being 0, by a plain forward."""
    module = AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.float64)
    with torch.no_grad(), full_precision(torch.float64):
        logits = module(tokens[None]).logits[0, :-1] / temperature
    return torch.cat([torch.zeros(1).double(), logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_hugging_face(models, family):
    model = models[family]
    module = AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.float64)
    prompts = prompts_of(5, seed=1)
    done = drain(make(model, slots=3, temperature=0.0), prompts)
    for prompt in prompts:
        expected = module.generate(
            torch.tensor([prompt.tokens]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            use_cache=False,
        )
        assert done[prompt.group_id].tokens.tolist() == expected[0].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_a_plain_forward(models, family, temperature):
    done = drain(make(models[family], temperature=temperature), prompts_of(3, 2, seed=2))
    for sample in done.values():
        expected = hugging_face_logprobs(models[family], sample.tokens, temperature)
        seen = sample.logprobs[sample.loss_mask]
        assert seen.dtype == torch.float64
        torch.testing.assert_close(seen, expected[sample.loss_mask], atol=1e-10, rtol=0)
        assert not sample.logprobs[~sample.loss_mask].any()
        wrong = hugging_face_logprobs(models[family], sample.tokens, temperature * 1.01)  # the control
        assert (seen - wrong[sample.loss_mask]).abs().max() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_and_batches_do_not_change_tokens(models, family):
    prompts = prompts_of(5, 3, seed=3, varied=True)
    runs = [drain(make(models[family], slots=slots), prompts) for slots in (1, 3, 8)]
    runs.append(drain(make(models[family], slots=8, module_path=True), list(reversed(prompts))))
    budget = make(models[family], slots=8)
    budget.prefill_tokens = 1
    runs.append(drain(budget, prompts))
    for one, other in pairwise(runs):
        assert one.keys() == other.keys()
        for sample_id, sample in one.items():
            assert torch.equal(sample.tokens, other[sample_id].tokens)
            torch.testing.assert_close(sample.logprobs, other[sample_id].logprobs, atol=1e-10, rtol=0)
    assert len({tuple(sample.tokens.tolist()) for sample in runs[0].values()}) > 10
    reseeded = drain(make(models[family], slots=8, seed=4), prompts)  # the control
    assert any(not torch.equal(reseeded[key].tokens, runs[0][key].tokens) for key in reseeded)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_order_of_feeding_and_stepping_gives_the_same_samples(models, data):
    """Feeding between steps, gaps closed when the queue is empty, aborts of other samples."""
    model = models["llama"]
    prompts = prompts_of(6, 2, seed=data.draw(st.integers(0, 5)), varied=True)
    expected = drain(make(model, slots=12), prompts)
    engine, done = make(model, slots=data.draw(st.integers(1, 6))), {}
    waiting = data.draw(st.permutations(prompts))
    gone: set[int] = set()
    while waiting or engine.busy:
        count = data.draw(st.integers(0, len(waiting))) if engine.busy else len(waiting[:1])
        engine.feed(waiting[:count])
        waiting = waiting[count:]
        if data.draw(st.integers(0, 9)) == 0:
            gone |= {sample.sample_id for sample in engine.abort([data.draw(st.integers(0, 11))])}
        done |= {sample.sample_id: sample for sample in engine.step()}
    assert done.keys() | gone == expected.keys()
    for sample_id, sample in done.items():
        assert torch.equal(sample.tokens, expected[sample_id].tokens)


@pytest.mark.parametrize("family", FAMILIES[:-1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_written_out_layers_equal_the_modules(models, family, dtype):
    """To the bit in bfloat16; float32 products of another width may be summed in another order."""
    model = load_model(models[family].source, dtype=dtype)
    engine = make(model)
    assert isinstance(engine._decoder, FusedDecoder)
    prompts = prompts_of(4, 2, seed=5)
    fused, plain = drain(engine, prompts), drain(make(model, module_path=True), prompts)
    for sample_id, sample in fused.items():
        assert torch.equal(sample.tokens, plain[sample_id].tokens)
        limit = 0 if dtype == "bfloat16" else 2e-6
        torch.testing.assert_close(sample.logprobs, plain[sample_id].logprobs, atol=limit, rtol=limit)


@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_fused_weights_are_views(models, family):
    decoder = FusedDecoder(models[family])
    storage = models[family].flat.storage.untyped_storage().data_ptr()
    for layer in decoder._layers:
        for linear in (layer.qkv, layer.gate_up):
            ((weight, _),) = linear.parts
            assert weight.untyped_storage().data_ptr() == storage


def test_models_without_flat_buffer_and_changed_modules():
    module = AutoModelForCausalLM.from_config(tiny_config("qwen2"), dtype=torch.float64)
    assert is_fusible(module)
    assert adjacent([torch.zeros(2, 3), torch.zeros(2, 3)]) is None
    prompts = prompts_of(3, 2, seed=6)
    fused, plain = drain(make(Bare(module)), prompts), drain(make(Bare(module), module_path=True), prompts)
    assert all(torch.equal(fused[key].tokens, plain[key].tokens) for key in fused)

    module.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not is_fusible(module)
    assert not is_fusible(AutoModelForCausalLM.from_config(tiny_config("gemma3")))


def test_a_model_in_training_mode_decodes_the_same(models):
    model, prompts = models["gemma3"], prompts_of(2)
    implementation = model.config._attn_implementation
    expected = drain(make(model), prompts)
    model.module.train()
    seen = drain(make(model), prompts)
    assert model.module.training
    assert model.config._attn_implementation == implementation
    model.module.eval()
    assert all(torch.equal(seen[key].tokens, expected[key].tokens) for key in seen)


def test_weights_replaced_in_place_are_seen(models, tmp_path):
    other = load_model(tiny_model(tmp_path / "other", "llama", "float64", seed=9), dtype="float64")
    model = load_model(models["llama"].source, dtype="float64")
    before, after = prompts_of(2, 2, seed=7), prompts_of(2, 2, seed=7)
    after = [Prompt(p.group_id + 2, tuple(i + 4 for i in p.sample_ids), p.tokens) for p in after]
    engine = make(model, slots=8)
    engine.feed(before)
    done = {sample.sample_id: sample for _ in range(5) for sample in engine.step()}
    model.flat.storage.copy_(other.flat.storage)
    engine.set_version(2)
    done |= drain(engine, after)
    for sample in done.values():
        drawn = sample.versions[sample.loss_mask].tolist()
        assert sample.versions[~sample.loss_mask].eq(-1).all()
        assert drawn == ([0] * 5 + [2] * 7 if sample.sample_id < 4 else [2] * 12)
        if sample.sample_id >= 4:  # prefilled again although the same prompts were in the cache
            expected = hugging_face_logprobs(other, sample.tokens)[sample.loss_mask]
            torch.testing.assert_close(sample.logprobs[sample.loss_mask], expected, atol=1e-10, rtol=0)


def test_samples_of_a_prompt_share_its_prefill(models):
    engine = make(models["llama"], slots=3)
    done = drain(engine, [Prompt(0, tuple(range(8)), tuple(range(10, 20)))])
    assert len(done) == 8
    assert engine.stats.prefill_tokens == 9
    again = make(models["llama"], slots=3)
    drain(again, [Prompt(0, (0,), tuple(range(10, 20))), Prompt(1, (1,), tuple(range(11, 20)))])
    assert again.stats.prefill_tokens == 9 + 8


def test_prompts_that_begin_alike_share_that_part(models):
    begin = tuple(range(10, 40))
    prompts = [Prompt(g, (2 * g, 2 * g + 1), (*begin, 50 + g, 60, 61)) for g in range(4)]
    together = make(models["llama"], slots=8)
    done = drain(together, prompts)
    assert together.stats.prefill_tokens == 32 + 3 * 2
    few = make(models["llama"], slots=3)
    seen = drain(few, prompts)
    assert few.stats.prefill_tokens == 32 + 3 * 2
    for sample_id, sample in done.items():
        assert torch.equal(sample.tokens, seen[sample_id].tokens)
        expected = hugging_face_logprobs(models["llama"], sample.tokens)[sample.loss_mask]
        torch.testing.assert_close(sample.logprobs[sample.loss_mask], expected, atol=1e-10, rtol=0)


def test_slots_stay_busy_while_prompts_wait(models):
    engine = make(models["llama"], slots=4)
    drain(engine, prompts_of(20, 2, varied=True))
    assert engine.stats.queued_slot_steps > 0
    assert engine.stats.queued_busy_slot_steps == engine.stats.queued_slot_steps
    assert engine.stats.busy_slot_steps == engine.stats.tokens < engine.stats.slot_steps
    assert engine.stats.seconds > 0


def test_the_end_token_ends_a_sample(models, tokenizer):
    free = drain(make(models["llama"], tokenizer=tokenizer), prompts_of(6))
    eos = free[0].tokens[free[0].loss_mask][4].item()
    ended = drain(make(models["llama"], tokenizer=tokenizer, eos_ids=(eos,)), prompts_of(6))
    for key, sample in ended.items():
        response = free[key].tokens[free[key].loss_mask].tolist()
        size = response.index(eos) + 1 if eos in response else 12
        assert sample.tokens[sample.loss_mask].tolist() == response[:size]
        assert sample.finish_reason == ("stop" if eos in response else "length")
        assert len(sample.tokens) == len(sample.logprobs) == len(sample.versions) == len(sample.loss_mask)
        assert sample.completion == tokenizer.decode(response[:size], skip_special_tokens=True)


def test_stop_strings_across_tokens(models, tokenizer):
    free = drain(make(models["llama"], tokenizer=tokenizer), prompts_of(4, seed=8))
    pieces = [
        tokenizer.decode([token], skip_special_tokens=True) for token in free[0].tokens[free[0].loss_mask]
    ]
    first = next(i for i in range(3, 10) if all(len(piece) == 1 for piece in pieces[i : i + 3]))
    stop = "".join(pieces[first : first + 3])  # three tokens
    ended = drain(
        make(models["llama"], tokenizer=tokenizer, stop=("no such text", stop)), prompts_of(4, seed=8)
    )
    size = len(ended[0].tokens)
    assert ended[0].finish_reason == "stop"
    assert ended[0].completion == "".join(pieces[:first])
    assert ended[0].tokens.tolist() == free[0].tokens[:size].tolist()
    assert int(ended[0].loss_mask.sum()) == first + 3
    special = make(models["llama"], tokenizer=tokenizer, stop=("<|im_end|>",))
    assert special._stops.end_ids == {tokenizer.eos_token_id}


def test_abort(models):
    engine = make(models["llama"], slots=2)
    engine.feed(prompts_of(4, seed=1))
    engine.step()
    (one,) = engine.abort([1, 77])
    assert (one.sample_id, one.finish_reason, int(one.loss_mask.sum())) == (1, "abort", 1)
    rest = engine.abort()
    assert sorted(sample.sample_id for sample in rest) == [0, 2, 3]
    assert sorted(int(sample.loss_mask.sum()) for sample in rest) == [0, 0, 1]
    assert not engine.busy
    assert engine.step() == []
    expected = drain(make(models["llama"]), prompts_of(4, seed=1))
    seen = drain(engine, prompts_of(4, seed=1))
    assert all(torch.equal(seen[key].tokens, expected[key].tokens) for key in seen)


def test_bad_prompts_are_refused_together(models):
    engine = make(models["llama"], max_length=20)
    bad = [
        Prompt(0, (0,), ()),
        Prompt(1, (1,), (1, 1000)),
        Prompt(2, (2, 3), (1,), (4,)),
        Prompt(3, (4,), tuple(range(9))),
        Prompt(4, (4,), (1,)),
        Prompt(5, (5, 5), (1,)),
    ]
    with pytest.raises(InputError) as caught:
        engine.feed([*bad, Prompt(6, (6,), (1,))])
    assert [problem.where for problem in caught.value.problems] == [f"prompt {index}" for index in range(6)]
    assert "9 prompt tokens and 12 new ones are 21, more than max_length 20" in str(caught.value)
    assert not engine.busy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"max_length": 513}, "513 is more than the 512 positions"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"stop": ("x",)}, "need a tokenizer"),
    ],
)
def test_bad_settings_are_refused(models, changes, message):
    with pytest.raises(InputError, match=message):
        make(models["llama"], **changes)


def test_models_that_cannot_be_decoded_are_refused():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    soft = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, intermediate_size=32)
    engine = make(Bare(AutoModelForCausalLM.from_config(soft)))
    engine.feed(prompts_of(1))
    with pytest.raises(InputError, match="softcap"):
        engine.step()
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    long = LlamaConfig(**sizes, intermediate_size=32, max_position_embeddings=128, rope_parameters=rope)
    long.rope_parameters["original_max_position_embeddings"] = 32
    with pytest.raises(InputError, match="rope type dynamic beyond 32"):
        make(Bare(AutoModelForCausalLM.from_config(long)))
