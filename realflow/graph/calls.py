"""The calls of a graph file read into values, each as far as it can be read by itself.

What only several calls together can tell (who writes what another reads) is in `check.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from realflow.errors import InputError
from realflow.graph.builtins import BUILTINS, GENERATE, TRAIN_READS
from realflow.graph.functions import resolve
from realflow.graph.refill import REFILL, check_decider
from realflow.graph.retokenize import OF_TEXT, read_retokenize
from realflow.graph.schema import (
    ANY_TEXT,
    FILE_NAME,
    FLAG,
    PLAIN,
    PLAIN_LIST,
    PLAIN_MAPPING,
    SECONDS,
    STEPS,
    TEXT,
    TEXTS,
    Kind,
    Section,
    Wrong,
    amount,
    named,
    nearest,
    number,
    one_of,
    shown,
    whole,
)
from realflow.graph.stages import LIMITS
from realflow.graph.types import (
    Call,
    FieldUse,
    FunctionDecl,
    ModelSpec,
    Normalise,
    Range,
    Refill,
    Sampling,
)

OPS = ("generate", "infer", "train", "function")
NORMALISE = ("token", "sequence")
_COMMON = ("op", "reads", "writes", "every")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "generate": (
        "model", "batch", "samples", "max_new_tokens", "temperature", "top_k", "top_p", "stop", "chat",
        "refill",
    ),
    "infer": ("model", "use", "options", "retokenize"),
    "train": ("model", "use", "options", "minibatches", "normalise"),
    "function": ("use", "options", "timeout"),
}  # fmt: skip
_USES = {"infer": ("output",), "train": ("loss",), "function": ("function", "reward")}
_USE_WORDS = {"infer": "a model output", "train": "a loss", "function": "a function or a reward"}

CALL_NAME = named("a name of letters, digits, _, . and -", FILE_NAME)
_FIELD = named("the name of a field (letters, digits and _)")
_NONE = FunctionDecl("", "function")


@dataclass(frozen=True)
class Draft:
    """A call as far as it can be read by itself. `sound` is false where it is not known what the
    call reads and writes.

    `renamed` holds the function's own names that `reads:` sets by hand.
    """

    call: Call
    renamed: frozenset[str]
    sound: bool

    @property
    def uses(self) -> tuple[FieldUse, ...]:
        """Every read: what the call's op implies, then what its function declares."""
        implied = TRAIN_READS if self.call.op == "train" else ()
        declared = self.call.decl.reads
        return (*(use for use in implied if use.name not in {read.name for read in declared}), *declared)


def read_calls(section: Section, models: Mapping[str, ModelSpec], folder: Path | None) -> list[Draft]:
    """`calls:` in the order of the file, each with its function resolved."""
    drafts = []
    for name in section.names(CALL_NAME):
        if name == "data":
            section.problem("a call cannot be named 'data', which is the name of the data source", name)
        drafts.append(_read_call(name, section.section(name), models, folder))
    if section.sound and not section.items:
        section.problem("is empty; expected at least one call")
    return drafts


def _read_call(name: str, section: Section, models: Mapping[str, ModelSpec], folder: Path | None) -> Draft:
    op = section.need("op", one_of(*OPS), None)
    if op is None:
        return Draft(Call(name, "function", _NONE), frozenset(), False)
    decl = GENERATE if op == "generate" else read_use(section, op, folder)
    retokenize = read_retokenize(section, decl) if op == "infer" else None
    if retokenize is not None and decl is not None:
        decl = OF_TEXT
    sound = decl is not None
    decl = decl or _NONE
    options = read_options(section, decl) if op != "generate" else {}
    if op == "train":
        options = {**options, "normalise": section.take("normalise", _NORMALISE, decl.normalise)}
    draft = Draft(
        Call(
            name,
            op,
            decl,
            model=None if op == "function" else _read_model(section, models),
            options=options,
            batch=section.need("batch", amount("prompts", "samples"), None) if op == "generate" else None,
            samples=section.take("samples", whole(1), 1) if op == "generate" else 1,
            sampling=_read_sampling(section) if op == "generate" else None,
            chat=section.take("chat", FLAG, True) if op == "generate" else True,
            minibatches=section.take("minibatches", whole(1), 1) if op == "train" else 1,
            every=section.take("every", STEPS, None),
            timeout=section.take("timeout", SECONDS, 60.0) if op == "function" else 60.0,
            refill=_read_refill(section, folder) if op == "generate" and "refill" in section else None,
            retokenize=retokenize,
        ),
        frozenset(),
        sound,
    )
    draft = _renamed(section, draft)
    known = (*_COMMON, *_KEYS[op])
    section.close(known, lambda key: _key_hint(key, op, decl))
    return draft


def _key_hint(key: str, op: str, decl: FunctionDecl) -> str | None:
    """More about a key that a call of this op does not take."""
    if key in decl.options:
        return f"it is an option of {decl.name}; write it under 'options'"
    others = [other for other, keys in _KEYS.items() if key in keys]
    return f"op {op} does not take it (op {' and '.join(others)} does)" if others else None


def _read_model(section: Section, models: Mapping[str, ModelSpec]) -> str | None:
    model = section.need("model", TEXT, None)
    if model is not None and model not in models:
        if models:  # that there are none is reported already
            section.problem(f"unknown model {model!r}; {nearest(model, models)}", "model")
        return None
    return model


def read_use(section: Section, op: str, folder: Path | None) -> FunctionDecl | None:
    """The declaration that `use:` names, or None where there is none that fits the op."""
    use = section.need("use", TEXT, None)
    if use is None:
        return None
    kinds = _USES[op]
    try:
        decl = resolve(use, folder)
    except InputError as error:
        fitting = [name for name, builtin in BUILTINS.items() if builtin.kind in kinds]
        for problem in error.problems:
            message = str(problem)
            if ":" not in use:
                message = (
                    f"unknown function {use!r}; {nearest(use, fitting)} (your own: package.module:function)"
                )
            section.problem(message, "use")
        return None
    if decl.kind not in kinds:
        word = {"output": "a model output", "loss": "a loss"}.get(decl.kind, "a function")
        section.problem(f"{use} is {word}; op {op} takes {_USE_WORDS[op]}", "use")
        return None
    return decl


def _read_refill(section: Section, folder: Path | None) -> Refill | None:
    """None where its function cannot be told: that is reported."""
    section = section.section("refill")
    decl = read_use(section, "function", folder)
    most = section.take("most", whole(1), Refill.most)
    if decl is None:
        return None
    check_decider(section, decl)
    call = Call(REFILL, "function", decl, options=read_options(section, decl))
    draft = _renamed(section, Draft(call, frozenset(), True))
    section.close(("use", "most", "options", "reads"))
    return Refill(draft.call, most) if draft.sound else None


def _read_sampling(section: Section) -> Sampling:
    stages = section.need("max_new_tokens", LIMITS, ((None, 1),))
    return Sampling(
        max_new_tokens=max(limit for _, limit in stages),
        stages=stages if len(stages) > 1 else (),
        temperature=section.take("temperature", number("a number >= 0 (0 is greedy)", least=0), 1.0),
        top_k=section.take("top_k", whole(), 0),
        top_p=section.take("top_p", number("a number above 0 and at most 1", above=0, most=1), 1.0),
        stop=section.take("stop", TEXTS, ()),
    )


def read_options(section: Section, decl: FunctionDecl) -> dict[str, Any]:
    """The function's options: its defaults, and over them what the graph sets."""
    inner = section.section("options")
    options = dict(decl.options)
    if decl is _NONE:
        return options
    for name, default in decl.options.items():
        if name not in inner:
            continue
        if name in decl.choices:
            options[name] = _choice(inner, name, decl.choices[name])
        elif name in decl.ranges:
            options[name] = inner.take(name, _within(decl.ranges[name], default), default)
        else:
            options[name] = inner.take(name, _like(default), default)
    inner.close(decl.options)
    return options


def _read_normalise(value: Any) -> Normalise:
    if not isinstance(value, Mapping):
        word: str = one_of(*NORMALISE).read(value)
        return word
    if value.keys() != {"constant"}:
        raise Wrong("the only key of a mapping here is 'constant'")
    return {"constant": number(above=0).read(value["constant"])}


_NORMALISE: Kind[Normalise] = Kind(
    "token, sequence or {constant: a number of tokens above 0}", _read_normalise
)


def _choice(section: Section, name: str, choices: tuple[Any, ...]) -> Any:
    value = section.items[name]
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        words = ", ".join(map(str, choices))
        advice = f"; {nearest(value, map(str, choices))}" if isinstance(value, str) else ""
        section.problem(f"found {shown(value)}, expected one of {words}{advice}", name)
        return choices[0]
    return value


def _within(wanted: Range, default: float | None) -> Kind[float | None]:
    """A number in a range; null too where that is the default."""

    def read(value: Any) -> float | None:
        if value is None and default is None:
            return None
        found = number().read(value)
        if found not in wanted:
            raise Wrong
        return found

    return Kind(f"{wanted}{' or null' if default is None else ''}", read)


def _like(default: Any) -> Kind[Any]:
    """The kind of an option's default; None takes any plain value."""
    if isinstance(default, bool):
        return FLAG
    if isinstance(default, int):
        return whole(-(2**63), 2**63 - 1)
    if isinstance(default, float):
        return number("a finite number")
    if isinstance(default, str):
        return ANY_TEXT
    if isinstance(default, list | tuple):
        return PLAIN_LIST
    return PLAIN_MAPPING if isinstance(default, Mapping) else PLAIN


def _renamed(section: Section, draft: Draft) -> Draft:
    """The draft with complete `reads` and `writes`: the declared fields, and renames over them."""
    call = draft.call
    reads, writes = section.section("reads"), section.section("writes")
    if not draft.sound:
        return draft
    maps = []
    before = len(section.report.problems)
    for inner, uses in ((reads, draft.uses), (writes, call.decl.writes)):
        fields = {use.name: inner.take(use.name, _FIELD, use.field) for use in uses}
        inner.close(fields)
        maps.append(fields)
    if len(section.report.problems) > before:
        return replace(draft, sound=False)
    call = replace(call, reads=maps[0], writes=maps[1])
    return Draft(call, frozenset(key for key in reads.items if key in maps[0]), True)
