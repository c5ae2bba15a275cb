"""The cases of `test_grid`, their data, and what plain Hugging Face makes of them on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparing import largest
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from realflow.algorithms.terms import LossTerms
from realflow.data.batch import Batch, pack
from realflow.graph.types import OptimizerSpec
from realflow.layout import Layout, cut

STEPS, SAMPLES, TEMPERATURE = 3, 28, 0.8
ALPHA = 6
SPEC = OptimizerSpec(lr=1e-2, weight_decay=0.1, clip_norm=0.5, warmup_steps=2)
# Adam moves an element whose gradient is all but zero by the sign of rounding errors, and one such element
# may be more of its tensor's update than the bound. So float32 models are drawn such that plain Hugging
# Face in float32 is within 2e-4 of itself in float64 in every update (and within 4e-6 in the gradients of
# equal weights), for three orders of the samples: with seed 3, else the next that does (`choose_seeds.py`).
# docs/decisions-training.md has what was found.
SEED = 3
SEEDS = {
    "llama-tied-lm-3-float32": 4,
    "mistral-tied-lm-3-float32": 4,
    "qwen2-untied-lm-4-float32": 4,
    "qwen3-tied-lm-8-float32": 6,
    "qwen3-untied-lm-3-float32": 4,
    "qwen3-untied-lm-8-float32": 11,
    "gemma3-tied-lm-4-float32": 4,
    "gemma3-tied-lm-8-float32": 18,
    "gemma3-untied-lm-3-float32": 5,
    "gemma3-untied-lm-4-float32": 5,
    "gemma3-untied-lm-8-float32": 7,
}
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
    lora: int = 0
    """The rank of the adapters that are trained; 0: everything is."""

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
        return f"{self.model}-{self.normalise}" + (f"-lora{self.lora}" if self.lora else "")

    @property
    def adapter(self) -> str:
        """The folder of the adapters that training starts from, in peft's format."""
        return f"{self.model}-adapter{self.lora}"

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
    least = 1 if dp < 8 else 0  # a micro-batch has at least one of the samples
    counts = [(r + step) % dp + least if dp > 2 else 2 * ((r + step) % dp) + 3 for r in range(dp)]
    return [0 if step == 1 and dp > 1 and count == min(counts) else count for count in counts]


def micro_batches(step: int, replica: int, dp: int) -> list[Batch]:
    counts = numbers(step, dp)
    before, total = sum(counts[:replica]), sum(counts)
    samples = samples_of(step)
    spans = [cut(SAMPLES, total, before + index) for index in range(counts[replica])]
    return [batch_of(samples, range(start, stop)) for start, stop in spans]


# ---------------------------------------------------------------- the reference


def make_model(folder: Path, case: Case, seed: int | None = None) -> None:
    """8 query heads and 4 key and value heads, so that t from 3 on shares or cuts unevenly."""
    seed = SEEDS.get(case.model, SEED) if seed is None else seed
    changes: dict[str, Any] = {"num_hidden_layers": case.layers, "num_attention_heads": 8}
    changes |= {"num_key_value_heads": 4, "head_dim": 4}
    if case.family == "gemma3":
        kinds = ("sliding_attention", "full_attention")
        changes["layer_types"] = [kinds[index % 2] for index in range(case.layers)]
    path = folder / case.model
    if case.head == "lm":
        tiny_model(path, case.family, case.dtype, tied=case.tied, seed=seed, **changes)
        return
    config = tiny_config(case.family, tied=case.tied, **changes)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, case.dtype))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    model.save_pretrained(path)


def make_adapter(folder: Path, case: Case) -> None:
    """Adapters of peft around every linear layer of the blocks, B not zero, so that no gradient is."""
    model = AutoModelForCausalLM.from_pretrained(folder / case.model, dtype=getattr(torch, case.dtype))
    config = LoraConfig(r=case.lora, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.1 * noise)
    adapted.save_pretrained(folder / case.adapter)


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
    """`steps` steps of plain Hugging Face and torch; one more in float32, for the gradient after `STEPS`.

    `rounding` is how far updates in float32 are from those in float64, `rounding_g0` the first gradients.
    """
    if case.dtype == "float64":
        return train(folder, case, steps, torch.float64)
    results = train(folder, case, STEPS + 1, torch.float32)  # bfloat16 trains float32 masters
    if case.dtype == "float32":
        truth = train(folder, case, STEPS, torch.float64)
        results["rounding"] = torch.tensor(rounding(results, truth, f"update{STEPS}"))
        results["rounding_g0"] = torch.tensor(rounding(results, truth, "g0"))
    return results


def wanted(run: Mapping[str, torch.Tensor], kind: str, name: str) -> torch.Tensor:
    """A parameter's gradient in step 0 (kind `g0`) or the sum of its first three updates (`update3`)."""
    if kind.startswith("update"):
        return run[f"w{kind.removeprefix('update')}/{name}"].double() - run[f"w0/{name}"].double()
    return run[f"{kind}/{name}"].double()


def rounding(run: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor], kind: str) -> float:
    """The largest ‖a - b‖ / ‖b‖ of a parameter."""
    names = [key.removeprefix("w0/") for key in truth if key.startswith("w0/")]
    pairs = [(wanted(run, kind, name), wanted(truth, kind, name)) for name in names]
    return largest(float((a - b).norm() / b.norm()) for a, b in pairs)


def one_by_one(model: torch.nn.Module, case: Case, step: int) -> torch.Tensor:
    """The loss of a step's samples, of which the gradients are taken."""
    rows = [score(model, case, sample).per_token[sample["loss_mask"][1:]] for sample in samples_of(step)]
    rows = [row for row in rows if len(row)]
    flat = torch.cat(rows).mean()
    loss = flat if case.normalise == "token" else torch.stack([row.mean() for row in rows]).mean()
    loss.backward()
    return loss.detach()


def plain_name(name: str) -> str:
    """The name of a parameter without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def train(
    folder: Path,
    case: Case,
    steps: int,
    dtype: torch.dtype,
    backward: Callable[[torch.nn.Module, Case, int], torch.Tensor] = one_by_one,
    last: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Plain Hugging Face and torch in `dtype` on one rank. Step `STEPS` is from the weights of the run `last`
    where one is given."""
    auto = AutoModelForCausalLM if case.head == "lm" else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder / case.model, dtype=dtype)
    if dtype == torch.float64:
        exact_norms(model)
    if case.lora:
        model = PeftModel.from_pretrained(
            model, folder / case.adapter, is_trainable=True, autocast_adapter_dtype=False
        )
    named = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": SPEC.weight_decay},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SPEC.lr, betas=SPEC.betas, eps=SPEC.eps)
    results = {f"w0/{name}": p.detach().clone() for name, p in named.items()}
    results["inferred"] = torch.cat([inferred(model, case, sample) for sample in samples_of(0)])
    for step in range(steps):
        if step == STEPS and last is not None:
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(last[f"w{STEPS}/{name}"])
        optimizer.zero_grad()
        loss = backward(model, case, step)
        results.update({f"g{step}/{name}": p.grad.clone() for name, p in named.items()})
        norm = torch.nn.utils.clip_grad_norm_(named.values(), SPEC.clip_norm)
        results[f"loss{step}"], results[f"norm{step}"] = loss, norm.detach()
        for group in optimizer.param_groups:
            group["lr"] = SPEC.lr * min(1.0, (step + 1) / SPEC.warmup_steps)
        optimizer.step()
        results.update({f"w{step + 1}/{name}": p.detach().clone() for name, p in named.items()})
    return results
