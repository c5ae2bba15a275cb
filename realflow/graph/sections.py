"""The models and the data of a graph file read into values: each key, its type and its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realflow.graph.gymtasks import TASKS
from realflow.graph.heads import INFER_OUTPUTS
from realflow.graph.schema import (
    FILE_NAME,
    FLAG,
    PLAIN,
    STEPS,
    TEXT,
    Kind,
    Section,
    Wrong,
    amount,
    named,
    nearest,
    number,
    one_of,
    read_element,
    whole,
)
from realflow.graph.types import DataSpec, Follow, ModelSpec, OptimizerSpec

DTYPES = ("bfloat16", "float32", "float64")
SCHEDULES = ("constant", "linear", "cosine")
REASONING_GYM_COLUMNS = ("question", "answer", "entry")

_OPTIMIZERS = ("adamw",)
_DATA_KEYS = (
    "source", "task", "path", "options", "size", "fields", "unique", "split", "shuffle", "batch", "tokenize",
    "max_length", "chat",
)  # fmt: skip

MODEL_NAME = named("a name of letters, digits, _, . and -", FILE_NAME)
_FIELD = named("the name of a field (letters, digits and _)")


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
            place=section.report.place((*model.path, "path")),
        )
        model.close(("path", "dtype", "head", "optimizer", "follows"))
    if section.sound and not section.items:
        section.problem("is empty; expected at least one model")
    return models


def _read_follow(section: Section) -> Follow | None:
    """None where it does not say which model: nothing more can be said of it."""
    follow = Follow(
        model=section.need("model", TEXT, ""),
        decay=section.need("decay", number("a number above 0 and below 1", above=0, below=1), 0.5),
        every=section.take("every", STEPS, 1),
    )
    section.close(("model", "decay", "every"))
    return follow if follow.model else None


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


def read_data(section: Section) -> DataSpec:
    """`data:` as a value."""
    fields = section.section("fields", required=True, expected="a mapping from fields to columns")
    split = section.section("split")
    spec = DataSpec(
        source=section.need("source", _SOURCE, ""),
        fields={name: fields.take(name, TEXT, name) for name in fields.names(_FIELD)},
        task=section.take("task", TEXT, None),
        path=section.take("path", TEXT, None),
        options=plain_mapping(section, "options"),
        size=section.take("size", whole(1), None),
        shuffle=section.take("shuffle", FLAG, True),
        tokenize=section.take("tokenize", TEXT, None),
        max_length=section.take("max_length", whole(2), None),
        unique=section.take("unique", TEXT, None),
        test=split.need("test", number("a fraction from 0 up to, not including, 1", least=0, below=1), 0.0)
        if "split" in section
        else 0.0,
        use=split.take("use", one_of("train", "test"), "train"),
        batch=section.take("batch", amount("prompts", "samples"), None),
        chat=section.take("chat", FLAG, True),
    )
    split.close(("test", "use"))
    section.close(_DATA_KEYS)
    _check_source(section, spec)
    _check_data(section, spec)
    return spec


def _read_source(value: Any) -> str:
    if not isinstance(value, str) or (value not in _SOURCE_KEYS and ":" not in value):
        raise Wrong(nearest(value, _SOURCE_KEYS) if isinstance(value, str) else "")
    return value


# Keys that only some sources take, and which of them each needs.
_SOURCE_KEYS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reasoning_gym": (("task", "options", "size"), ("task",)),
    "jsonl": (("path", "size"), ("path",)),
    "parquet": (("path", "size"), ("path",)),
}
_FUNCTION_KEYS = (("path", "options", "size"), ())
_SOURCE = Kind("reasoning_gym, jsonl, parquet or package.module:function", _read_source)


def _check_source(section: Section, spec: DataSpec) -> None:
    """Keys that the source does not take, or lacks."""
    if not spec.source:
        return
    taken, needed = _SOURCE_KEYS.get(spec.source, _FUNCTION_KEYS)
    for key in ("task", "path", "options", "size"):
        if key in section and key not in taken:
            section.problem(f"the source {spec.source} takes no {key!r}; remove it", key)
    for key in needed:
        if key not in section:
            section.problem(f"{key!r} is missing; the source {spec.source} needs it")
    if spec.source == "reasoning_gym":
        columns = {("fields", name): column for name, column in spec.fields.items()}
        for place, column in (columns | ({("unique",): spec.unique} if spec.unique else {})).items():
            if column not in REASONING_GYM_COLUMNS:
                advice = nearest(column, REASONING_GYM_COLUMNS)
                section.problem(f"the source reasoning_gym has no column {column!r}; {advice}", *place)
        _check_task(section, spec)


def _check_task(section: Section, spec: DataSpec) -> None:
    """The task of reasoning-gym, and the names of its options."""
    if spec.task is None:
        return
    if spec.task not in TASKS:
        section.problem(f"unknown reasoning-gym task {spec.task!r}; {nearest(spec.task, TASKS)}", "task")
        return
    known = TASKS[spec.task].split()
    for name in spec.options:
        if name not in known:
            advice = nearest(name, known, many=30)
            section.problem(f"task {spec.task} has no option {name!r}; {advice}", "options", name)


def check_data_path(section: Section, spec: DataSpec, folder: Path) -> None:
    """The file of a jsonl or parquet source is there; a relative path starts at the graph's folder."""
    if spec.path is None or spec.source not in ("jsonl", "parquet"):
        return
    path = folder / Path(spec.path).expanduser()
    if not path.exists():
        section.problem(
            f"{path}: no such file; a relative path starts at the folder of the graph file", "path"
        )
    elif not path.is_file():
        section.problem(f"{path}: this is a folder; expected a {spec.source} file", "path")


def _check_data(section: Section, spec: DataSpec) -> None:
    if spec.use == "test" and spec.test == 0:
        section.problem("'use: test' needs a held-out fraction; set 'test' above 0", "split")
    if spec.test > 0 and spec.unique is None:
        section.problem(
            "a split needs 'unique': the column whose equal values stay on one side of it", "split"
        )
    if spec.tokenize is None:
        if "chat" in section:
            section.problem(
                "'chat' is for data that is tokenized; set 'tokenize' to a model or remove it", "chat"
            )
        return
    for name in ("prompt", "completion"):
        if name not in spec.fields and "fields" in section:
            section.problem(
                f"'tokenize' needs the field {name!r}; name its column under 'fields'", "tokenize"
            )


def plain_mapping(section: Section, key: str) -> dict[str, Any]:
    """A mapping of plain values under a key."""
    inner = section.section(key)
    return {name: inner.take(name, PLAIN, None) for name in inner.names(TEXT)}
