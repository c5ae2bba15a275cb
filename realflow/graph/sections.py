"""The models of a graph file read into values: each key, its type and its bounds."""

from __future__ import annotations

from typing import Any

from realflow.graph.heads import INFER_OUTPUTS
from realflow.graph.schema import (
    FILE_NAME,
    STEPS,
    TEXT,
    TEXTS,
    Kind,
    Section,
    Wrong,
    named,
    number,
    one_of,
    read_element,
    whole,
)
from realflow.graph.types import Follow, LoraSpec, ModelSpec, OptimizerSpec

DTYPES = ("bfloat16", "float32", "float64")
SCHEDULES = ("constant", "linear", "cosine")

_OPTIMIZERS = ("adamw",)
MODEL_NAME = named("a name of letters, digits, _, . and -", FILE_NAME)


def read_models(section: Section) -> dict[str, ModelSpec]:
    """`models:` as values, without those whose name cannot be read."""
    models = {}
    for name in section.names(MODEL_NAME):
        model = section.section(name)
        models[name] = ModelSpec(
            name,
            path=model.need("path", TEXT, ""),
            dtype=model.take("dtype", one_of(*DTYPES), "bfloat16"),
            optimizer=_read_optimizer(model.section("optimizer")) if "optimizer" in model else None,
            head=model.take("head", one_of(*INFER_OUTPUTS), "lm"),
            follows=_read_follow(model.section("follows")) if "follows" in model else None,
            lora=_read_lora(model.section("lora")) if "lora" in model else None,
            place=section.report.place((*model.path, "path")),
        )
        _check_lora(model, models[name])
        model.close(("path", "dtype", "head", "optimizer", "follows", "lora"))
    if section.sound and not section.items:
        section.problem("is empty; expected at least one model")
    return models


def _read_follow(section: Section) -> Follow | None:
    """None where it does not say which model (nothing more can be said of it), or where the rate is 0: the
    model then never follows."""
    follow = Follow(
        model=section.need("model", TEXT, ""),
        decay=_read_decay(section),
        every=section.take("every", STEPS, 1),
    )
    section.close(("model", "decay", "rate", "every"))
    return follow if follow.model and follow.decay < 1 else None


def _read_decay(section: Section) -> float:
    """`decay`, or 1 less the `rate`; one of the two is said."""
    if "rate" not in section:
        return section.need("decay", number("a number above 0 and below 1", above=0, below=1), 0.5)
    if "decay" in section:
        section.problem("rate and decay say the same (rate is 1 - decay); keep one of them", "rate")
    return 1 - section.take("rate", number("a number from 0 to below 1", least=0, below=1), 0.5)


def _read_lora(section: Section) -> LoraSpec | None:
    """None without a rank: nothing more can be said of it. `alpha` is twice the rank unless given."""
    rank = section.need("rank", whole(1), 0)
    spec = LoraSpec(
        rank=rank,
        alpha=section.take("alpha", number("a number above 0", above=0), 2.0 * rank),
        targets=section.take("targets", TEXTS, ()),
        save=section.take("save", one_of("adapters", "merged"), "adapters"),
    )
    section.close(tuple(LoraSpec.__dataclass_fields__))
    return spec if rank else None


def _check_lora(section: Section, model: ModelSpec) -> None:
    """Adapters are of a language model: another head starts from zeros and is trained itself."""
    if model.lora is not None and model.head != "lm":
        section.problem(f"a model with 'head: {model.head}' is trained whole; remove 'lora'", "lora")


def _read_optimizer(section: Section) -> OptimizerSpec:
    spec = OptimizerSpec(
        name=section.take("name", one_of(*_OPTIMIZERS), "adamw"),
        lr=section.take("lr", number("a number >= 0", least=0), 1e-6),
        betas=section.take("betas", _BETAS, (0.9, 0.999)),
        eps=section.take("eps", number("a number > 0", above=0), 1e-8),
        weight_decay=section.take("weight_decay", number("a number >= 0", least=0), 0.0),
        clip_norm=section.take("clip_norm", number("a number > 0", above=0), 1.0),
        schedule=section.take("schedule", one_of(*SCHEDULES), "constant"),
        warmup_steps=section.take("warmup_steps", whole(), 0),
        min_lr=section.take("min_lr", number("a number >= 0", least=0), 0.0),
    )
    if spec.min_lr > spec.lr:
        section.problem(f"found {spec.min_lr:g}, expected at most lr, which is {spec.lr:g}", "min_lr")
    section.close(tuple(OptimizerSpec.__dataclass_fields__))
    return spec


def _read_betas(value: Any) -> tuple[float, float]:
    beta = number("", least=0, below=1)
    if not isinstance(value, list | tuple):
        raise Wrong
    if len(value) != 2:
        raise Wrong(f"the list has {len(value)} element{'s' * (len(value) != 1)}")
    first, second = (read_element(beta, value, index) for index in (0, 1))
    return first, second


_BETAS: Kind[tuple[float, float]] = Kind("a list of two numbers in [0, 1)", _read_betas)
