"""The training engine on one rank: schedules, normalisation, fields, errors, states."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from grid_reference import exact_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_model

from realflow.algorithms.terms import LossTerms
from realflow.data.batch import Batch, pack
from realflow.engines.infer import infer, prepare, scored_tokens, scores
from realflow.engines.objective import Objective
from realflow.engines.optimizer import FlatAdamW, check_spec, learning_rate
from realflow.engines.state import load_state, save_state
from realflow.engines.train import TrainEngine
from realflow.errors import InputError, RunError
from realflow.graph.types import OptimizerSpec
from realflow.models.causal import CausalModel, load_model

LENGTHS = (7, 3, 12, 5)


def sft(logprobs) -> LossTerms:
    return LossTerms(-logprobs, {"half": torch.full_like(logprobs, 0.5)})


def batch(lengths=LENGTHS, seed: int = 0, masked: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(4, 100, (length,), generator=generator) for length in lengths]
    values = {"tokens": tokens, "score": [float(i) for i in range(len(lengths))]}
    if masked:
        values["loss_mask"] = [torch.arange(length) >= 2 for length in lengths]
    extents = {"tokens": "token", "loss_mask": "token", "score": "sample"}
    dtypes = {"tokens": "int", "loss_mask": "bool", "score": "float"}
    return pack(range(len(lengths)), lengths, values, extents, dtypes)


@pytest.fixture
def model(tmp_path: Path) -> CausalModel:
    return load_model(tiny_model(tmp_path / "model", dtype="float64"), dtype="float64")


# ---------------------------------------------------------------- optimizer


@settings(deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 20), st.integers(1, 50))
def test_schedules_rise_then_fall(schedule: str, warmup: int, total: int) -> None:
    spec = OptimizerSpec(lr=2.0, min_lr=0.5, schedule=schedule, warmup_steps=warmup)
    rates = [learning_rate(spec, step, total + warmup) for step in range(warmup + total + 1)]
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup] == 2.0
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.5)


def test_values_of_the_cosine_schedule() -> None:
    spec = OptimizerSpec(lr=1.0, min_lr=0.2, schedule="cosine", warmup_steps=2)
    rates = [learning_rate(spec, step, 6) for step in range(7)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.882843, 0.6, 0.317157, 0.2], abs=1e-6)


def test_bad_optimizers_are_refused_together() -> None:
    with pytest.raises(InputError) as caught:
        check_spec(OptimizerSpec(name="sgd", lr=-1.0, schedule="step"))
    assert [problem.where for problem in caught.value.problems] == [
        "optimizer.name",
        "optimizer.lr",
        "optimizer.schedule",
        "optimizer.schedule",
    ]
    with pytest.raises(InputError, match="total number"):
        check_spec(OptimizerSpec(schedule="linear"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_adamw_equals_torch(dtype: torch.dtype) -> None:
    spec = OptimizerSpec(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(100, dtype=dtype, generator=generator)
    theirs = [part.clone().requires_grad_() for part in (ours[:60], ours[60:])]
    groups = [{"params": theirs[:1], "weight_decay": 0.3}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=spec.betas, eps=spec.eps)
    optimizer = FlatAdamW([ours[:50], ours[50:]], spec, [ours[:50], ours[50:60]])
    for _ in range(5):
        gradient = torch.randn(100, dtype=dtype, generator=generator)
        theirs[0].grad, theirs[1].grad = gradient[:60].clone(), gradient[60:].clone()
        reference.step()
        optimizer.step([gradient[:50], gradient[50:]], 0.1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours, torch.cat(theirs).detach(), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- engine


def gradient(model: CausalModel, batches, **settings) -> torch.Tensor:
    engine = TrainEngine(model, OptimizerSpec())
    engine.backward(batches, Objective(settings.pop("loss", sft), **settings))
    engine.close()
    return torch.cat([gradient.clone() for gradient in engine.gradients()])


def score(model: CausalModel, one: Batch, places: torch.Tensor, temperature: float):
    return scores(model, model.run(prepare(model, one)), one, places, temperature)


def masters(engine: TrainEngine) -> torch.Tensor:
    return torch.cat([shard.tensors["master"].flatten() for shard in engine.masters.shards()]).clone()


def test_dividing_into_micro_batches_changes_nothing(model: CausalModel) -> None:
    whole = gradient(model, [batch()])
    singles = []
    for index, length in enumerate(LENGTHS):
        start = sum(LENGTHS[:index])
        cut = slice(start, start + length)
        fields = {name: batch().fields[name][cut] for name in ("tokens", "loss_mask")}
        singles.append(Batch((index,), torch.tensor([length]), fields))
    assert (gradient(model, singles) - whole).norm() <= 1e-12 * whole.norm()


def test_normalisations_differ_and_are_what_they_say(model: CausalModel) -> None:
    places = scored_tokens(batch())
    log_p = score(model, batch(), places, 1.0).logprobs.detach()
    pieces = log_p.split([length - 2 for length in LENGTHS])
    for normalise, expected in (
        ("token", -log_p.mean()),
        ("sequence", -torch.stack([piece.mean() for piece in pieces]).mean()),
    ):
        engine = TrainEngine(model, OptimizerSpec(lr=0.0))  # two in turn on one model
        metrics = engine.step([batch()], sft, reads={}, normalise=normalise)
        assert metrics["actor/loss"] == pytest.approx(float(expected), rel=1e-12)
        assert metrics["actor/half"] == pytest.approx(0.5, rel=1e-12)
        engine.close()
    with pytest.raises(InputError, match="normalise"):
        engine.step([batch()], sft, reads={}, normalise="batch")


def test_fields_reach_the_loss_in_the_form_it_declares(model: CausalModel) -> None:
    seen = {}

    def loss(logprobs, tokens, score, lengths, *, entropy, scale) -> LossTerms:
        seen.update(tokens=tokens, score=score, lengths=lengths, entropy=entropy, scale=scale)
        return LossTerms(-logprobs)

    reads = {"tokens": "tokens", "score": "score"}
    engine = TrainEngine(model, OptimizerSpec())
    engine.backward([batch()], Objective(loss, reads, {"scale": 3}))
    assert seen["scale"] == 3 and seen["lengths"].tolist() == list(LENGTHS)
    assert seen["tokens"].shape == seen["score"].shape == seen["entropy"].shape == (sum(LENGTHS),)
    assert seen["score"].dtype == torch.float64
    assert seen["score"].tolist() == [float(i) for i, length in enumerate(LENGTHS) for _ in range(length)]
    engine.backward([batch()], Objective(loss, reads, {"scale": 3}, extents={"score": "sample"}))
    assert seen["score"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_masked_tokens_may_be_anything(model: CausalModel) -> None:
    def wild(logprobs, loss_mask) -> LossTerms:
        values = -logprobs / loss_mask  # NaN, with a gradient that is NaN too, where masked
        return LossTerms(values, {"metric": values.detach()})

    clean = gradient(model, [batch()])
    found = gradient(model, [batch()], loss=wild, reads={"loss_mask": "loss_mask"})
    assert torch.equal(found, clean) and bool(found.isfinite().all())


def test_a_gradient_that_is_not_finite_changes_nothing(model: CausalModel) -> None:
    engine = TrainEngine(model, OptimizerSpec(lr=1.0))
    before = model.flat.storage.clone()
    with pytest.raises(RunError, match=r"optimizer step 0: the gradient is not finite.*embed_tokens"):
        engine.step([batch()], lambda logprobs: LossTerms(logprobs * torch.inf), reads={})
    assert torch.equal(model.flat.storage, before) and engine.version == 0


def test_wrong_losses_are_named(model: CausalModel) -> None:
    engine = TrainEngine(model, OptimizerSpec())
    with pytest.raises(InputError, match=r"per_token has shape \[1\], expected \[27\]"):
        engine.step([batch()], lambda logprobs: LossTerms(logprobs.sum()[None]), reads={})
    with pytest.raises(InputError, match="does not depend"):
        engine.step([batch()], lambda logprobs: LossTerms(torch.zeros(27)), reads={})
    with pytest.raises(RunError, match="no loss token"):
        engine.step([], sft, reads={})
    with pytest.raises(InputError, match="temperature"):
        engine.step([batch()], sft, reads={}, temperature=0.0)


def test_a_batch_without_loss_tokens_counts_nothing(model: CausalModel) -> None:
    empty = batch((2, 1))  # prompts only
    assert len(scored_tokens(empty)) == 0
    assert torch.equal(gradient(model, [empty, batch()]), gradient(model, [batch()]))


def test_bfloat16_trains_its_float32_masters(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path, dtype="float32"), dtype="bfloat16")
    engine = TrainEngine(model, OptimizerSpec(lr=1e-5))
    start = masters(engine)
    weights = model.flat.storage.clone()
    losses = [engine.step([batch()], sft, reads={})["actor/loss"] for _ in range(3)]
    moved = masters(engine) - start
    assert moved.dtype == torch.float32 and 1e-5 < moved.abs().max() < 4e-5
    assert (model.flat.storage != weights).float().mean() < 0.5  # most steps are below bfloat16's spacing
    held = torch.cat([model.flat.view(shard.name).flatten() for shard in engine.masters.shards()])
    assert torch.equal(held, masters(engine).bfloat16())
    assert losses[2] < losses[0]


def test_training_lowers_the_loss_and_counts_versions(model: CausalModel) -> None:
    engine = TrainEngine(model, OptimizerSpec(lr=1e-2, clip_norm=0.0))
    losses = [engine.step([batch()], sft, reads={})["actor/loss"] for _ in range(10)]
    assert losses[-1] < losses[0] / 2 and engine.version == 10


# ---------------------------------------------------------------- states


def trained(path: Path, steps: int = 3) -> TrainEngine:
    engine = TrainEngine(load_model(path, dtype="float64"), OptimizerSpec(lr=1e-2))
    for seed in range(steps):
        engine.step([batch(seed=seed)], sft, reads={})
    return engine


def cut_state(source: Path, folder: Path, parts: int, leave_out: str = "") -> None:
    """The state in `source` as another layout would have stored it: boxes cut in the middle of rows
    and columns, dealt to `parts` files."""
    folder.mkdir()
    with safe_open(source, framework="pt") as file:
        facts, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(parts)]
    for key, tensor in sorted(tensors.items()):
        kind, name, text = key.split("|")
        starts = [int(side.split(":")[0]) for side in text.split(",")]
        half = [size // 2 for size in tensor.shape]
        for index, corner in enumerate(
            itertools.product(*([(0, h), (h, n)] for h, n in zip(half, tensor.shape, strict=True)))
        ):
            piece = tensor[tuple(slice(*side) for side in corner)].contiguous()
            box = ",".join(f"{o + a}:{o + b}" for o, (a, b) in zip(starts, corner, strict=True))
            if not (name == leave_out and index == 0):
                files[(len(name) + index) % parts][f"{kind}|{name}|{box}"] = piece
    for index, content in enumerate(files):
        save_file(content, folder / f"shard-{index:05d}-of-{parts:05d}.safetensors", metadata=facts)


def test_states_of_any_cut_continue_exactly(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model", "qwen3", dtype="float64")
    first = trained(path)
    whole = save_state(first, tmp_path / "whole")
    cut_state(whole, tmp_path / "cut", 3)
    second = TrainEngine(load_model(path, dtype="float64"), OptimizerSpec(lr=1e-2))
    load_state(second, tmp_path / "cut")
    assert torch.equal(second.model.flat.storage, first.model.flat.storage) and second.version == 3
    for engine in (first, second):
        engine.step([batch(seed=9)], sft, reads={})
    assert torch.equal(second.model.flat.storage, first.model.flat.storage) and second.version == 4


def test_states_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model", dtype="float64")
    first = trained(path, steps=1)
    whole = save_state(first, tmp_path / "whole")
    before = first.model.flat.storage.clone()
    cut_state(whole, tmp_path / "gap", 2, leave_out="model.norm.weight")
    with pytest.raises(InputError, match=r"model.norm.weight 0:16 is in none of the files"):
        load_state(first, tmp_path / "gap")
    other = tiny_model(tmp_path / "other", dtype="float64", num_hidden_layers=1)
    with pytest.raises(
        InputError, match=r"other parameters: model.layers.1\S+ has shape \[.*\], expected none"
    ):
        load_state(TrainEngine(load_model(other, dtype="float64"), OptimizerSpec()), tmp_path / "whole")
    single = TrainEngine(load_model(path, dtype="float32"), OptimizerSpec())
    with pytest.raises(InputError, match=r"is float64, expected float32"):
        load_state(single, tmp_path / "whole")
    with pytest.raises(InputError, match=r"no shard-\*.safetensors"):
        load_state(first, tmp_path / "nothing")
    later = trained(path, steps=2)
    save_state(later, tmp_path / "mixed")
    shutil.copy(whole, tmp_path / "mixed" / "shard-00001-of-00002.safetensors")
    with pytest.raises(InputError, match=r"one version, found \[1, 2\]"):
        load_state(first, tmp_path / "mixed")
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        load_state(first, tmp_path / "whole")
    assert torch.equal(first.model.flat.storage, before) and first.version == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_offloading_lets_go_of_memory_and_changes_nothing(tmp_path: Path, dtype: str) -> None:
    path = tiny_model(tmp_path, dtype="float32")
    engines = [TrainEngine(load_model(path, dtype=dtype), OptimizerSpec(lr=1e-2)) for _ in range(2)]
    away = engines[1]
    tensors = [away._gradients.data, away.masters._optimizer.exp_avg, *away.masters._own]
    assert len(tensors) == (3 if dtype == "bfloat16" else 2)
    for seed in range(3):
        found = [engine.step([batch(seed=seed)], sft, reads={}) for engine in engines]
        assert found[0] == found[1]
        held = [{k: t.clone() for k, t in shard.tensors.items()} for shard in away.masters.shards()]
        away.offload()
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        away.restore()
        for shard, before in zip(away.masters.shards(), held, strict=True):
            assert all(torch.equal(tensor, before[kind]) for kind, tensor in shard.tensors.items())
    assert torch.equal(engines[0].model.flat.storage, away.model.flat.storage)


# ---------------------------------------------------------------- inference


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_inference_equals_hugging_face(tmp_path: Path, dtype: str, tolerance: float) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_model(tmp_path, "qwen3", dtype)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    if dtype == "float64":
        exact_norms(plain)
    model = load_model(path, dtype=dtype)
    for masked in (True, False):
        batches = [batch(masked=masked), batch((1, 9), seed=1, masked=masked)]
        found = infer(model, batches, temperature=0.7)
        assert [len(values) for values in found] == [*LENGTHS, 1, 9]
        tokens = [t for b in batches for t in b.fields["tokens"].split(b.lengths.tolist())]
        for values, ids in zip(found, tokens, strict=True):
            log_p = torch.log_softmax(plain(ids[None]).logits[0, :-1] / 0.7, -1)
            expected = torch.zeros(len(ids), dtype=log_p.dtype)
            expected[1:] = log_p.gather(1, ids[1:, None])[:, 0].detach()
            expected[: 2 if masked else 1] = 0
            torch.testing.assert_close(values, expected, rtol=0, atol=tolerance)
            assert not values.requires_grad


def test_inference_and_training_say_the_same_bit_for_bit(model: CausalModel) -> None:
    """So that the ratio of the first optimizer step is 1 exactly."""
    one = batch()
    places = scored_tokens(one)
    with torch.no_grad():
        expected = score(model, one, places, 0.7).logprobs
    assert torch.equal(torch.cat(infer(model, [one], "logprobs", 0.7))[places], expected)


def test_a_state_that_cannot_be_written_leaves_the_one_before(
    model: CausalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TrainEngine(model, OptimizerSpec())
    path = save_state(engine, tmp_path / "state")
    before = path.read_bytes()

    def fails(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("realflow.engines.state.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_state(engine, tmp_path / "state")
    assert [file.name for file in (tmp_path / "state").iterdir()] == [path.name]
    assert path.read_bytes() == before
