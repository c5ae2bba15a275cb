"""Data-parallel training on 1, 2 and 4 ranks equals plain Hugging Face training on one.

One launch of four gloo processes runs every case; this process computes the references. Data is
off-policy, of different lengths, and divided unevenly: ranks have different numbers of micro-batches,
some none. Controls with a mistake built in must fail the same comparison. More families and sizes are
tested by `make test-full`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from realflow.algorithms.terms import LossTerms
from realflow.data.batch import Batch, pack
from realflow.engines.infer import infer_logprobs
from realflow.engines.state import load_state, save_state
from realflow.engines.train import TrainEngine
from realflow.graph.types import OptimizerSpec
from realflow.models.causal import CausalModel, load_model
from realflow.models.precision import full_precision

STEPS, SAMPLES, TEMPERATURE = 3, 9, 0.8
SPEC = OptimizerSpec(lr=1e-2, weight_decay=0.1, clip_norm=0.5, warmup_steps=2)
MODELS = {
    "llama": ("llama", True),
    "qwen3": ("qwen3", False),
    "llama-untied": ("llama", False),
    "qwen2": ("qwen2", True),
    "mistral": ("mistral", False),
    "gemma3": ("gemma3", True),
}
EXACTNESS = {"gemma3": 1e-6}  # its norms are float32 whatever the dtype: the order of a sum shows
READS = {"old_logprobs": "logprobs", "advantages": "advantages"}
EXTENTS = {"logprobs": "token", "tokens": "token", "loss_mask": "token", "advantages": "sample"}
DTYPES = {"logprobs": "float", "tokens": "int", "loss_mask": "bool", "advantages": "float"}


@dataclass(frozen=True)
class Case:
    model: str
    dtype: str
    size: int
    normalise: str = "token"
    mistake: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.model, self.dtype, str(self.size), self.normalise, self.mistake)))


EXACT = [Case(model, "float64", size) for model in ("llama", "qwen3") for size in (1, 2, 4)]
EXACT += [Case("qwen3", "float64", 4, "sequence")]
SINGLE = [Case(model, "float32", size) for model in ("llama", "qwen3") for size in (1, 2, 4)]
MISTAKES = ("other-data", "averaged", "local-count", "scaled-sample")
PARALLEL = [case for case in EXACT + SINGLE if case.size > 1]
CONTROLS = [Case("llama", "float64", 2, mistake=mistake) for mistake in MISTAKES]
EVERY = [
    Case(model, dtype, size) for model in MODELS for dtype in ("float64", "float32") for size in (1, 2, 3, 4)
]
EVERY += [Case(model, "float64", 3, "sequence") for model in MODELS]
EVERY = [case for case in EVERY if case not in EXACT + SINGLE]


def ppo(logprobs, old_logprobs, advantages, *, entropy, clip=0.2, bonus=0.01) -> LossTerms:
    ratio = (logprobs - old_logprobs).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    metrics = {"pg_clipfrac": (clipped < free).double(), "ratio": ratio.detach()}
    return LossTerms(-torch.minimum(free, clipped) - bonus * entropy, metrics)


def samples_of(step: int) -> list[dict]:
    """The global minibatch of a step: samples of 6 to 30 tokens with a prompt of 2 to 5."""
    generator = torch.Generator().manual_seed(100 + step)

    def draw(low: int, high: int, count: int = 1) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    samples = []
    for _ in range(SAMPLES):
        length, prompt = int(draw(6, 31)), int(draw(2, 6))
        mask = torch.arange(length) >= prompt
        mask[-1] = bool(draw(0, 2))
        noise = torch.rand(length, generator=generator, dtype=torch.float64)
        samples.append(
            {
                "tokens": draw(0, 100, length),
                "loss_mask": mask,
                "logprobs": -8 * noise * mask,
                "advantages": float(torch.randn(1, generator=generator)),
            }
        )
    return samples


def batch_of(samples: list[dict], ids: list[int]) -> Batch:
    chosen = [samples[i] for i in ids]
    values = {name: [sample[name] for sample in chosen] for name in EXTENTS}
    return pack(ids, [len(sample["tokens"]) for sample in chosen], values, EXTENTS, DTYPES)


def micro_batches(step: int, rank: int, size: int) -> list[Batch]:
    """Rank 0 has half the samples in three micro-batches; in step 1 the last rank has none."""
    working = size - 1 if size > 1 and step == 1 else size
    if rank >= working:
        return []
    mine = list(range(rank * SAMPLES // working, (rank + 1) * SAMPLES // working))
    cuts = [mine[:1], mine[1:3], mine[3:]] if rank == 0 else [mine[:2], mine[2:]]
    return [batch_of(samples_of(step), ids) for ids in cuts if ids]


# ---------------------------------------------------------------- the four processes


def run_case(case: Case, folder: Path, group, rank: int) -> dict[str, torch.Tensor]:
    model = load_model(folder / f"{case.model}-{case.dtype}", dtype=case.dtype)
    engine = TrainEngine(model, SPEC, group=group, rank=rank, size=case.size)
    results = {f"w0/{name}": model.flat.view(name).clone() for name in model.flat.slots}
    if case.dtype == "float32":
        results["logprobs"] = everyones_logprobs(case, model, group, rank)
    if case.mistake == "local-count":
        engine._count = lambda batches, places: (  # type: ignore[method-assign]
            max(1, sum(map(len, places))),
            1,
        )
    for step in range(STEPS):
        batches = micro_batches(step, rank, case.size)
        if case.mistake == "other-data" and rank == 1:
            batches = micro_batches(step + 10, rank, case.size)
        if case.mistake == "scaled-sample" and rank == 1 and step == 0:
            batches[0].fields["advantages"].mul_(1 + 1e-6)
        metrics = engine.backward(
            batches, ppo, reads=READS, temperature=TEMPERATURE, normalise=case.normalise
        )
        if case.mistake == "averaged":
            engine.gradient.div_(case.size)
        whole = engine.gradient.clone()
        if case.size > 1:
            whole = whole.new_empty(len(whole) * case.size)
            dist.all_gather_into_tensor(whole, engine.gradient, group=group)
        for name, slot in model.flat.slots.items():
            results[f"g{step}/{name}"] = whole[slot.offset : slot.offset + slot.size].view(slot.shape)
        metrics.update(engine.update())
        results[f"m{step}"] = torch.tensor([metrics[key] for key in sorted(metrics)], dtype=torch.float64)
        assert sorted(metrics) == ["entropy", "grad_norm", "loss", "lr", "pg_clipfrac", "ratio"]
    assert engine.version == STEPS
    results.update({f"w{STEPS}/{name}": model.flat.view(name) for name in model.flat.slots})
    return {name: tensor.detach().clone() for name, tensor in results.items()}


def everyones_logprobs(case: Case, model: CausalModel, group, rank: int) -> torch.Tensor:
    """[steps, samples, 30]: each rank infers its own micro-batches."""
    found = torch.zeros(STEPS, SAMPLES, 30)
    for step in range(STEPS):
        batches = micro_batches(step, rank, case.size)
        ids = [sample for one in batches for sample in one.ids]
        for sample, values in zip(ids, infer_logprobs(model, batches, TEMPERATURE), strict=True):
            found[step, sample, : len(values)] = values
    if case.size > 1:
        dist.all_reduce(found, group=group)
    return found


def worker(rank: int, folder: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    groups = {1: None} | {size: dist.new_group(range(size)) for size in (2, 3, 4)}
    for case in cases:
        if rank < case.size:
            results = run_case(case, folder, groups[case.size], rank)
            if rank in (0, case.size - 1):
                save_file(results, folder / f"{case.name}.{'first' if rank == 0 else 'last'}")
    reshard(folder, groups, rank)
    dist.destroy_process_group()


def reshard(folder: Path, groups: dict, rank: int) -> None:
    """Three steps on two ranks; their training state continued on four."""
    path = folder / "llama-float64"
    settings = {"reads": READS, "temperature": TEMPERATURE}
    if rank < 2:
        engine = TrainEngine(load_model(path, dtype="float64"), SPEC, group=groups[2], rank=rank, size=2)
        for step in range(STEPS):
            engine.step(micro_batches(step, rank, 2), ppo, **settings)
        save_state(engine, folder / "state", rank, 2)
    dist.barrier(groups[4])
    model = load_model(path, dtype="float64")
    engine = TrainEngine(model, SPEC, group=groups[4], rank=rank, size=4)
    load_state(engine, folder / "state")
    assert engine.version == STEPS
    engine.step(micro_batches(STEPS, rank, 4), ppo, **settings)
    if rank == 3:
        save_file({name: model.flat.view(name).clone() for name in model.flat.slots}, folder / "resharded")


def launch(folder: Path, cases: list[Case]) -> Path:
    """Run `cases` on four processes; what they found lies in `folder`."""
    for name, dtype in sorted({(case.model, case.dtype) for case in cases} | {("llama", "float64")}):
        family, tied = MODELS[name]
        tiny_model(folder / f"{name}-{dtype}", family, dtype, tied=tied, seed=3)
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(worker, (folder, cases), nprocs=4)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return launch(tmp_path_factory.mktemp("invariance"), [*EXACT, *SINGLE, *CONTROLS])


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    return launch(tmp_path_factory.mktemp("everything"), EVERY)


# ---------------------------------------------------------------- the reference


def reference(folder: Path, case: Case, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Plain Hugging Face and torch: one rank, one sample at a time, full logits."""
    model = AutoModelForCausalLM.from_pretrained(
        folder / f"{case.model}-{case.dtype}", dtype=getattr(torch, case.dtype)
    )
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": SPEC.weight_decay},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SPEC.lr, betas=SPEC.betas, eps=SPEC.eps)
    results = {f"w0/{name}": p.detach().clone() for name, p in named.items()}
    for step in range(steps):
        rows = []
        for sample in samples_of(step):
            with full_precision(model.dtype):
                logits = model(sample["tokens"][None]).logits[0, :-1] / TEMPERATURE
            log_p = torch.log_softmax(logits, -1)
            mask = sample["loss_mask"][1:]
            terms = ppo(
                log_p.gather(1, sample["tokens"][1:, None])[:, 0],
                sample["logprobs"][1:].to(log_p.dtype),
                sample["advantages"],
                entropy=-(log_p.exp() * log_p).sum(-1),
            )
            rows.append(terms.per_token[mask])
        if case.normalise == "token":
            loss = torch.cat(rows).mean()
        else:
            loss = torch.stack([row.mean() for row in rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        results.update({f"g{step}/{name}": p.grad.clone() for name, p in named.items()})
        norm = torch.nn.utils.clip_grad_norm_(named.values(), SPEC.clip_norm)
        results[f"loss{step}"], results[f"norm{step}"] = loss.detach(), norm.detach()
        for group in optimizer.param_groups:
            group["lr"] = SPEC.lr * min(1.0, (step + 1) / SPEC.warmup_steps)
        optimizer.step()
    results.update({f"w{steps}/{name}": p.detach().clone() for name, p in named.items()})
    return results


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


def worst(found: dict, expected: dict, kind: str) -> float:
    """The largest difference of any tensor: kind `g0`, `g1`, `g2`, or `update` for w3 - w0."""
    names = [key.split("/", 1)[1] for key in expected if key.startswith("w0/")]
    if kind == "update":
        moved = [{n: x[f"w{STEPS}/{n}"] - x[f"w0/{n}"] for n in names} for x in (found, expected)]
    else:
        moved = [{n: x[f"{kind}/{n}"] for n in names} for x in (found, expected)]
    return max(difference(moved[0][name], moved[1][name]) for name in names)


def check_float64(folder: Path, case: Case) -> None:
    found, expected = load_file(folder / f"{case.name}.first"), reference(folder, case)
    assert all(torch.equal(found[key], expected[key]) for key in expected if key.startswith("w0/"))
    for kind in ("g0", "g1", "g2", "update"):
        assert worst(found, expected, kind) <= EXACTNESS.get(case.model, 1e-8), kind
    for step in range(STEPS):
        _, norm, loss, lr, _, _ = found[f"m{step}"].tolist()
        rel = EXACTNESS.get(case.model, 1e-9)
        assert loss == pytest.approx(float(expected[f"loss{step}"]), rel=rel)
        assert norm == pytest.approx(float(expected[f"norm{step}"]), rel=rel)
        assert lr == pytest.approx(SPEC.lr * min(1.0, (step + 1) / 2))


def check_float32(folder: Path, case: Case) -> None:
    found, expected = load_file(folder / f"{case.name}.first"), reference(folder, case)
    assert worst(found, expected, "g0") <= 1e-5
    assert worst(found, expected, "update") <= 2e-3
    assert (found["logprobs"] - plain_logprobs(folder, case)).abs().max() <= 1e-4


def plain_logprobs(folder: Path, case: Case, temperature: float = TEMPERATURE) -> torch.Tensor:
    """What `everyones_logprobs` must find, one sample at a time by Hugging Face."""
    model = AutoModelForCausalLM.from_pretrained(folder / f"{case.model}-{case.dtype}", dtype=torch.float32)
    found = torch.zeros(STEPS, SAMPLES, 30)
    for step in range(STEPS):
        for index, sample in enumerate(samples_of(step)):
            tokens = sample["tokens"]
            with torch.no_grad():
                log_p = (model(tokens[None]).logits[0, :-1] / temperature).log_softmax(-1)
            scored = log_p.gather(1, tokens[1:, None])[:, 0] * sample["loss_mask"][1:]
            found[step, index, 1 : len(tokens)] = scored
    return found


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_float64_equals_plain_hugging_face(folder: Path, case: Case) -> None:
    check_float64(folder, case)


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
def test_float32_is_close(folder: Path, case: Case) -> None:
    check_float32(folder, case)


def test_logprobs_of_another_temperature_are_not_close(folder: Path) -> None:
    """The control."""
    case = SINGLE[1]
    found = load_file(folder / f"{case.name}.last")["logprobs"]
    assert (found - plain_logprobs(folder, case, TEMPERATURE * 1.001)).abs().max() > 1e-4


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_family_and_size(everything: Path, case: Case) -> None:
    (check_float64 if case.dtype == "float64" else check_float32)(everything, case)


@pytest.mark.parametrize("case", PARALLEL, ids=lambda case: case.name)
def test_all_ranks_hold_the_same_weights_and_metrics(folder: Path, case: Case) -> None:
    first, last = (load_file(folder / f"{case.name}.{which}") for which in ("first", "last"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.name)
def test_controls_fail(folder: Path, case: Case) -> None:
    found, expected = load_file(folder / f"{case.name}.first"), reference(folder, case)
    assert worst(found, expected, "g0") > 1e-8
    if case.mistake in ("other-data", "local-count", "averaged"):
        assert worst(found, expected, "g0") > 1e-2  # as gross as the mistake


def test_training_state_continues_on_another_number_of_ranks(folder: Path) -> None:
    found = load_file(folder / "resharded")
    expected = reference(folder, Case("llama", "float64", 1), steps=STEPS + 1)
    for name, tensor in found.items():
        start = expected[f"w0/{name}"]
        assert difference(tensor - start, expected[f"w{STEPS + 1}/{name}"] - start) <= 1e-8
