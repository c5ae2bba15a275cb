"""Training and inference under many layouts in one launch, compared with plain Hugging Face.

Each rank compares what it holds with a reference that is made here from `AutoModelForCausalLM`,
`torch.optim.AdamW` and a loop over single sequences, and writes what it found as JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from realflow.algorithms.terms import LossTerms
from realflow.data.batch import Batch, pack
from realflow.engines.infer import infer
from realflow.engines.objective import Objective
from realflow.engines.state import load_state, save_state
from realflow.engines.train import TrainEngine
from realflow.graph.types import OptimizerSpec
from realflow.layout import Box, DeviceMesh, Layout, cut
from realflow.models.causal import load_model
from realflow.models.place import Place, groups_of

STEPS, SAMPLES, TEMPERATURE = 3, 28, 0.8
# Adam moves an element whose gradient is all but zero by the sign of rounding errors: eps, a thousandth
# of a usual element, keeps float32 comparable.
SPEC = OptimizerSpec(lr=1e-2, eps=1e-5, weight_decay=0.1, clip_norm=0.5, warmup_steps=2)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
READS = {"old_logprobs": "logprobs", "advantages": "advantages"}
EXTENTS = {"logprobs": "token", "tokens": "token", "loss_mask": "token", "advantages": "sample"}
DTYPES = {"logprobs": "float", "tokens": "int", "loss_mask": "bool", "advantages": "float"}


@dataclass(frozen=True)
class Case:
    """A training run. `after` names a layout whose saved state it continues for one more step."""

    family: str
    layout: str
    dtype: str = "float64"
    tied: bool = True
    schedule: str = "1f1b"
    recompute: bool = False
    sequence: bool = False
    normalise: str = "token"
    head: str = "lm"
    mistake: str = ""
    after: str = ""

    @property
    def shape(self) -> Layout:
        return Layout.parse(self.layout)

    @property
    def layers(self) -> int:
        pp = self.shape.pp
        return 3 if pp <= 2 else 4 if pp <= 4 else 8

    @property
    def model(self) -> str:
        return f"{self.family}-{'tied' if self.tied else 'untied'}-{self.head}-{self.layers}-{self.dtype}"

    @property
    def reference(self) -> str:
        return f"{self.model}-{self.normalise}"

    @property
    def name(self) -> str:
        marks = [self.reference, self.layout, self.schedule]
        marks += ["recompute"] if self.recompute else []
        marks += ["sequence"] if self.sequence else []
        marks += [self.mistake] if self.mistake else []
        marks += [f"after-{self.after}"] if self.after else []
        return "-".join(marks)


# ---------------------------------------------------------------- data


def ppo(logprobs, old_logprobs, advantages, *, entropy, clip=0.2, bonus=0.01) -> LossTerms:
    ratio = (logprobs - old_logprobs).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    metrics = {"pg_clipfrac": (clipped < free).double(), "ratio": ratio.detach()}
    return LossTerms(-torch.minimum(free, clipped) - bonus * entropy, metrics)


def squares(values, old_logprobs, advantages, lengths=None) -> LossTerms:
    """A value loss: the state before tokens[i] has the number of entry i - 1."""
    before = values.roll(1)
    metrics = {"pg_clipfrac": (before > advantages).double(), "ratio": before.detach()}
    return LossTerms((before - advantages + 0.1 * old_logprobs).square(), metrics)


LOSSES = {"lm": ppo, "value": squares}


def samples_of(step: int) -> list[dict[str, Any]]:
    """The global minibatch of a step: 4 to 9 tokens a sample; two in three begin as the one before."""
    generator = torch.Generator().manual_seed(100 + step)

    def draw(low: int, high: int, count: int = 1) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    samples: list[dict[str, Any]] = []
    for index in range(SAMPLES):
        length, prompt = int(draw(4, 10)), int(draw(1, 4))
        tokens = draw(0, 100, length)
        if index % 3:
            tokens[:prompt] = samples[-1]["tokens"][:prompt]
        mask = torch.arange(length) >= prompt
        mask[-1] = bool(draw(0, 2)) or length == prompt + 1
        noise = torch.rand(length, generator=generator, dtype=torch.float64)
        samples.append(
            {
                "tokens": tokens,
                "loss_mask": mask,
                "logprobs": -8 * noise * mask,
                "advantages": float(torch.randn(1, generator=generator)),
            }
        )
    return samples


def batch_of(samples: list[dict[str, Any]], ids: Iterable[int]) -> Batch:
    chosen = [samples[i] for i in ids]
    values = {name: [sample[name] for sample in chosen] for name in EXTENTS}
    return pack(list(ids), [len(sample["tokens"]) for sample in chosen], values, EXTENTS, DTYPES)


def numbers(step: int, dp: int) -> list[int]:
    """Micro-batches of each replica: all different; in step 1 one of several replicas has none."""
    counts = [(r + step) % dp + 1 if dp > 2 else 2 * ((r + step) % dp) + 3 for r in range(dp)]
    return [0 if step == 1 and dp > 1 and count == min(counts) else count for count in counts]


def micro_batches(step: int, replica: int, dp: int) -> list[Batch]:
    counts = numbers(step, dp)
    before, total = sum(counts[:replica]), sum(counts)
    samples = samples_of(step)
    spans = [cut(SAMPLES, total, before + index) for index in range(counts[replica])]
    return [batch_of(samples, range(start, stop)) for start, stop in spans]


# ---------------------------------------------------------------- the reference


def make_model(folder: Path, case: Case) -> None:
    """8 query heads and 4 key and value heads, so that t from 3 on shares or cuts unevenly."""
    changes: dict[str, Any] = {"num_hidden_layers": case.layers, "num_attention_heads": 8}
    changes |= {"num_key_value_heads": 4, "head_dim": 4}
    if case.family == "gemma3":
        kinds = ("sliding_attention", "full_attention")
        changes["layer_types"] = [kinds[index % 2] for index in range(case.layers)]
    path = folder / case.model
    if case.head == "lm":
        tiny_model(path, case.family, case.dtype, tied=case.tied, seed=3, **changes)
        return
    config = tiny_config(case.family, tied=case.tied, **changes)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, case.dtype))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    model.save_pretrained(path)


def exact_norms(model: torch.nn.Module) -> None:
    """transformers' norms compute in float32 whatever the dtype: here the same formulas in float64."""

    def forward(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        scaled = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * (1 + norm.weight) if type(norm).__name__.startswith("Gemma") else scaled * norm.weight

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)


def score(model: torch.nn.Module, case: Case, sample: Mapping[str, Any]) -> LossTerms:
    """The loss of one sequence, by full logits; entry i is of tokens[i + 1]."""
    tokens = sample["tokens"]
    if case.head == "value":
        numbers = model.score(model.model(tokens[None]).last_hidden_state)[0, :, 0]
        old = sample["logprobs"].to(numbers.dtype)
        terms = squares(numbers, old, sample["advantages"])
        return LossTerms(terms.per_token[1:], {})
    logits = model(tokens[None]).logits[0, :-1] / TEMPERATURE
    log_p = torch.log_softmax(logits, -1)
    return ppo(
        log_p.gather(1, tokens[1:, None])[:, 0],
        sample["logprobs"][1:].to(log_p.dtype),
        sample["advantages"],
        entropy=-(log_p.exp() * log_p).sum(-1),
    )


def inferred(model: torch.nn.Module, case: Case, sample: Mapping[str, Any]) -> torch.Tensor:
    """What `infer` gives for one sequence."""
    tokens = sample["tokens"]
    with torch.no_grad():
        if case.head == "value":
            return model.score(model.model(tokens[None]).last_hidden_state)[0, :, 0]
        log_p = (model(tokens[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
        found = log_p.new_zeros(len(tokens))
        found[1:] = log_p.gather(1, tokens[1:, None])[:, 0] * sample["loss_mask"][1:]
        return found


def reference(folder: Path, case: Case, steps: int) -> dict[str, torch.Tensor]:
    """`steps` steps of plain Hugging Face and torch: one rank, one sample at a time."""
    auto = AutoModelForCausalLM if case.head == "lm" else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder / case.model, dtype=getattr(torch, case.dtype))
    if case.dtype == "float64":
        exact_norms(model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": SPEC.weight_decay},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SPEC.lr, betas=SPEC.betas, eps=SPEC.eps)
    results = {f"w0/{name}": p.detach().clone() for name, p in named.items()}
    results["inferred"] = torch.cat([inferred(model, case, sample) for sample in samples_of(0)])
    for step in range(steps):
        rows = [score(model, case, sample).per_token[sample["loss_mask"][1:]] for sample in samples_of(step)]
        rows = [row for row in rows if len(row)]
        flat = torch.cat(rows).mean()
        loss = flat if case.normalise == "token" else torch.stack([row.mean() for row in rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        results.update({f"g{step}/{name}": p.grad.clone() for name, p in named.items()})
        norm = torch.nn.utils.clip_grad_norm_(named.values(), SPEC.clip_norm)
        results[f"loss{step}"], results[f"norm{step}"] = loss.detach(), norm.detach()
        for group in optimizer.param_groups:
            group["lr"] = SPEC.lr * min(1.0, (step + 1) / SPEC.warmup_steps)
        optimizer.step()
        results.update({f"w{step + 1}/{name}": p.detach().clone() for name, p in named.items()})
    return results


# ---------------------------------------------------------------- one rank


class Comparison:
    """Squared differences of the boxes that this rank holds from the reference's."""

    def __init__(self, expected: Mapping[str, torch.Tensor]) -> None:
        self.expected = expected
        self.found: dict[str, dict[str, list[float]]] = {}

    def add(self, kind: str, name: str, box: Box, values: torch.Tensor) -> None:
        there = self.wanted(kind, name)[tuple(slice(*side) for side in box)]
        square = float((values.detach().double() - there).square().sum())
        entry = self.found.setdefault(kind, {}).setdefault(name, [0.0, 0, self.norm(kind, name)])
        entry[0] += square
        entry[1] += values.numel()

    def wanted(self, kind: str, name: str) -> torch.Tensor:
        if kind.startswith("update"):
            after = kind.removeprefix("update")
            return (self.expected[f"w{after}/{name}"] - self.expected[f"w0/{name}"]).double()
        return self.expected[f"{kind}/{name}"].double()

    def norm(self, kind: str, name: str) -> float:
        return float(self.wanted(kind, name).norm())


def run_case(case: Case, folder: Path, place: Place, expected: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    rank, dp = place.everyone.index, place.dp
    model = load_model(folder / case.model, dtype=case.dtype, place=place, head=case.head)
    start = {name: model.flat.view(name).clone() for name in model.flat.slots}
    model.recompute, model.sequence_parallel = case.recompute, case.sequence
    engine = TrainEngine(model, SPEC, schedule=case.schedule, bucket=1024)
    objective = Objective(LOSSES[case.head], READS, {}, TEMPERATURE, case.normalise, {"advantages": "token"})
    found = Comparison(expected)
    result: dict[str, Any] = {"metrics": [], "found": found.found}
    if not case.after:
        result["inferred"] = compare_inferred(case, model, dp.index, dp.size, expected)
    make_mistake(case, engine, model, rank)
    steps = range(STEPS)
    if case.after:
        load_state(engine, folder / f"state-{case.reference}-{case.after}")
        assert engine.version == STEPS
        steps = range(STEPS, STEPS + 1)
    for step in steps:
        batches = micro_batches(step, dp.index, dp.size)
        if case.mistake == "scaled-sample" and rank == place.everyone.size - 1 and step == 0:
            batches[0].fields["advantages"].mul_(1 + 1e-6)
        metrics = engine.backward(batches, objective)
        if case.mistake == "averaged":
            for gradient in engine.gradients():
                gradient.div_(dp.size)
        data = engine._gradients.data
        for run in engine.masters.runs:
            for name, first, last, order in engine.arrangement.names(run.order, run.order + run.size):
                compare_flat(found, f"g{step}", name, engine, run.order, first, last, data[order:])
        metrics.update(engine.update())
        result["metrics"].append(metrics)
        if step == 1:
            engine.offload()
            engine.restore()
    last = steps[-1] + 1
    assert engine.version == last
    boxes = model.boxes()
    worst = 0.0
    for shard in engine.masters.shards():
        if shard.counted:
            before = expected[f"w0/{shard.name}"][tuple(slice(*side) for side in shard.box)]
            found.add(f"update{last}", shard.name, shard.box, shard.tensors["master"] - before)
    digests = {}
    for name, box in boxes.items():
        view = model.flat.view(name)
        there = found.wanted(f"update{last}", name)[tuple(slice(*side) for side in box)]
        off = float((view.double() - start[name].double() - there).norm())
        worst = max(worst, off / found.norm(f"update{last}", name)) if not case.after else worst
        content = view.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digests[f"{name} {box}"] = hashlib.sha256(content).hexdigest()
    result["weights"], result["digests"] = worst, digests
    if any(other.after == case.layout for other in ALL.get(case.reference, ())) and not case.mistake:
        save_state(engine, folder / f"state-{case.reference}-{case.layout}")
    engine.close()
    return result


ALL: dict[str, list[Case]] = {}


def compare_flat(
    found: Comparison,
    kind: str,
    name: str,
    engine: TrainEngine,
    order: int,
    first: int,
    last: int,
    data: torch.Tensor,
) -> None:
    """A range of a parameter's gradient, where this rank is the one that counts it."""
    from realflow.engines.norms import counts

    if not counts(engine.arrangement, engine.model.place, order):
        return
    box = engine.model.boxes()[name]
    there = found.wanted(kind, name)[tuple(slice(*side) for side in box)].reshape(-1)[first:last]
    square = float((data[: last - first].double() - there).square().sum())
    entry = found.found.setdefault(kind, {}).setdefault(name, [0.0, 0, found.norm(kind, name)])
    entry[0] += square
    entry[1] += last - first


def compare_inferred(
    case: Case, model: Any, replica: int, dp: int, expected: Mapping[str, torch.Tensor]
) -> float:
    """The largest difference of this replica's inferred numbers (only the last stage has any)."""
    batches = micro_batches(0, replica, dp)
    output = {"lm": "logprobs", "value": "values"}[case.head]
    found = infer(model, batches, output, TEMPERATURE)
    if not model.place.is_last:
        assert found == []
        return 0.0
    samples = samples_of(0)
    starts = [0]
    for sample in samples:
        starts.append(starts[-1] + len(sample["tokens"]))
    ids = [i for batch in batches for i in batch.ids]
    assert len(found) == len(ids)
    return max(
        float((values - expected["inferred"][starts[i] : starts[i + 1]]).abs().max())
        for i, values in zip(ids, found, strict=True)
    )


def make_mistake(case: Case, engine: TrainEngine, model: Any, rank: int) -> None:
    if case.mistake == "no-partial-sum":
        engine._sum_partial = lambda: None  # type: ignore[method-assign]
    elif case.mistake == "no-tied-sum":
        engine._sum_tied = lambda: None  # type: ignore[method-assign]
    elif case.mistake == "perturbed" and rank == 1:
        name = next(name for name in model.flat.slots if "mlp" in name)
        model.flat.view(name).mul_(1 + 1e-5)


# ---------------------------------------------------------------- the launch


def worker(rank: int, folder: Path, ranks: int, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=240 + 4 * len(cases)),
    )
    meshes = {case.layout: DeviceMesh(tuple(range(case.shape.size)), case.shape) for case in cases}
    needed = sorted(set().union(*(groups_of(mesh) for mesh in meshes.values())))
    groups = {members: dist.new_group(list(members)) for members in needed}
    references = sorted({case.reference: case for case in cases}.items())
    for case in cases:
        ALL.setdefault(case.reference, []).append(case)
    for index, (name, case) in enumerate(references):
        if index % ranks == rank:
            steps = STEPS + 1 if any(other.after for other in ALL[name]) else STEPS
            save_file(reference(folder, case, steps), folder / f"{name}.reference")
    dist.barrier()
    current: tuple[str, dict[str, torch.Tensor]] = ("", {})
    for case in cases:
        if case.after:  # every rank has written its part
            dist.barrier()
        if rank >= case.shape.size:
            continue
        if current[0] != case.reference:
            current = case.reference, load_file(folder / f"{case.reference}.reference")
        place = Place.of(meshes[case.layout], rank, groups)
        result = run_case(case, folder, place, current[1])
        (folder / f"{case.name}.{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def launch(folder: Path, ranks: int, cases: list[Case]) -> Path:
    """Run `cases` on `ranks` processes; what they found lies in `folder`."""
    for case in {case.model: case for case in cases}.values():
        make_model(folder, case)
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(worker, (folder, ranks, cases), nprocs=ranks)
    return folder


def collected(folder: Path, case: Case) -> list[dict[str, Any]]:
    """What each rank found."""
    return [json.loads((folder / f"{case.name}.{rank}.json").read_text()) for rank in range(case.shape.size)]


def differences(results: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Parameter -> ‖a - b‖ / ‖b‖ over the whole tensor, of which each element must be counted once."""
    total: dict[str, list[float]] = {}
    for result in results:
        for name, (square, count, norm) in result["found"].get(kind, {}).items():
            entry = total.setdefault(name, [0.0, 0, norm])
            entry[0] += square
            entry[1] += count
    return {name: math.sqrt(square) / norm for name, (square, _, norm) in total.items()}


def elements(results: list[dict[str, Any]], kind: str) -> dict[str, int]:
    """Parameter -> how many elements of it the ranks counted."""
    total: dict[str, int] = {}
    for result in results:
        for name, (_, count, _) in result["found"].get(kind, {}).items():
            total[name] = total.get(name, 0) + count
    return total
