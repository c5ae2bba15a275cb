"""Functions that graphs name: how they declare what they read and write, and how they are found.

    @function(reads={"rewards": "sample float", "group_ids": "sample int field=group_id"},
              writes={"advantages": "sample float"}, scope="group")
    def centred(rewards, group_ids, *, scale=1.0): ...

    @loss(reads={"old_logprobs": "token float field=logprobs"}, needs=("logprobs",))
    def my_loss(old_logprobs, logprobs, *, clip=0.2): ...

Each read is a parameter, each keyword-only parameter with a default an option. A function without a
declaration is taken as a reward: TRL's `f(completions, **columns)` or verl's
`compute_score(data_source, solution_str, ground_truth, extra_info=None)`.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from realflow.errors import InputError, Problem
from realflow.graph.builtins import BUILTINS
from realflow.graph.heads import LOSS_OUTPUTS
from realflow.graph.modules import import_user_module
from realflow.graph.schema import NAME, PLAIN_MAPPING, Wrong, nearest
from realflow.graph.types import EXTENTS, FieldUse, FunctionDecl, Kind, Normalise, Scope

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("int", "float", "bool", "text", "any")
SCOPES = ("sample", "group", "batch")
LOSS_SCOPES = ("sample", "group")
"""A loss never sees a whole batch: no layout would have it so."""
OUTPUTS = tuple(output for given in LOSS_OUTPUTS.values() for output in given)
"""Model outputs that a loss can need."""

RESULTS = {"state": "what they keep", "metrics": "metrics of the step"}
"""What functions return beside the fields that they write -> what it is."""

_DECLARATION = "__realflow__"
_USER = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_REWARDS = (FieldUse("rewards", "rewards", "sample", "float"),)
# Columns of TRL and verl that have a field of another name here.
_TRL_FIELDS = {"completions": "completion", "prompts": "prompt"}
_VERL_FIELDS = {"solution_str": "completion", "ground_truth": "answer"}


def function(
    *,
    reads: Mapping[str, str],
    writes: Mapping[str, str],
    scope: Scope = "sample",
    state: Mapping[str, Any] | None = None,
) -> Callable[[F], F]:
    """Declare a function from fields to fields.

    `reads` and `writes` map a name to `"<extent> <dtype>"` (prompt, sample or token; int, float,
    bool, text or any), then, where wanted, `field=<name>` (the graph's field, if it has another name)
    and `optional` (reads only). `scope` is what the function must see at once: a sample, a group
    (the samples of one prompt) or the batch. `state` (name -> value at the start, for scope batch) is
    what it keeps from step to step: it is given the dict as its parameter `state`, and returns it beside
    its fields under that name. Under the name `metrics` it may return numbers, which become metrics of
    the step. Raises InputError where this and the function differ.
    """
    return lambda of: _attach(of, "function", reads, writes, scope, (), state or {})


def loss(
    *,
    reads: Mapping[str, str],
    needs: Sequence[str] = ("logprobs",),
    scope: Scope = "sample",
    normalise: Normalise = "token",
) -> Callable[[F], F]:
    """Declare a loss: fields as in `function`, and the model outputs that it is given.

    Parameters called `mask` (bool [T], the tokens that count) and `lengths` (int64 [S]) are given too.
    A loss that looks at the samples of a prompt together has scope `group`, so that they are never
    divided. `normalise` is what its tokens count unless a graph says otherwise: `token`, `sequence` or
    `{"constant": n}`.
    """

    def attach(of: F) -> F:
        _attach(of, "loss", reads, {}, scope, tuple(needs))
        setattr(of, _DECLARATION, replace(getattr(of, _DECLARATION), normalise=normalise))
        return of

    return attach


def declaration(of: Callable[..., Any]) -> FunctionDecl | None:
    """The declaration that a decorator left on a function."""
    found = getattr(of, _DECLARATION, None)
    return found if isinstance(found, FunctionDecl) else None


def resolve(use: str, folder: Path | None = None) -> FunctionDecl:
    """The declaration of what a graph calls `use`: a built-in, or `package.module:function`.

    User functions are imported: from a file in `folder` (that of the graph file) where there is one.
    Raises InputError for an unknown name, a failing import, or a signature that cannot be called.
    """
    if use in BUILTINS:
        return BUILTINS[use]
    if ":" not in use:
        advice = nearest(use, BUILTINS)
        raise InputError(f"unknown function {use!r}; {advice} (your own are written package.module:function)")
    return declare(load_function(use, folder), use)


def declare(of: Callable[..., Any], use: str) -> FunctionDecl:
    """The declaration of a user's function: its decorator's, or that of a reward by its signature."""
    found = declaration(of)
    return replace(found, name=use) if found is not None else _reward(of, use)


def load_function(use: str, folder: Path | None = None) -> Callable[..., Any]:
    """Import `package.module:function`. Raises InputError that says what failed, and where."""
    if not _USER.fullmatch(use):
        raise InputError(
            f"{use!r} is not a function's name; expected package.module:function, such as rewards:exact"
        )
    module_name, _, name = use.partition(":")
    try:
        module = import_user_module(module_name, folder)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InputError(f"{use}: importing {module_name} failed: {_cause(error)}") from error
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(
            f"{use}: module {module_name} ({module.__file__}) has no {name!r}; {nearest(name, public)}"
        )
    of = getattr(module, name)
    if not callable(of) or inspect.isclass(of):
        raise InputError(f"{use}: found {type(of).__name__}, expected a function")
    return of


def _cause(error: BaseException) -> str:
    """The error's type and message, and the line of the user's that raised it."""
    here = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and str(Path(frame.filename).parent) != here
    ]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _attach(
    of: F,
    kind: Kind,
    reads: Mapping[str, str],
    writes: Mapping[str, str],
    scope: Scope,
    needs: tuple[str, ...],
    state: Mapping[str, Any] | None = None,
) -> F:
    setattr(of, _DECLARATION, _declared(of, kind, reads, writes, scope, needs, state or {}))
    return of


def _declared(
    of: Callable[..., Any], kind: Kind, reads: Mapping[str, str], writes: Mapping[str, str], scope: Scope,
    needs: tuple[str, ...], state: Mapping[str, Any],
) -> FunctionDecl:  # fmt: skip
    """The declaration, checked against the function's parameters."""
    name = getattr(of, "__qualname__", repr(of))
    problems: list[str] = []
    read = tuple(_field_use(key, text, problems) for key, text in reads.items())
    written = tuple(_field_use(key, text, problems) for key, text in writes.items())
    scopes = LOSS_SCOPES if kind == "loss" else SCOPES
    if scope not in scopes:
        problems.append(f"scope {scope!r}; expected one of {', '.join(scopes)}")
    problems += [f"needs {need!r}; {nearest(need, OUTPUTS)}" for need in needs if need not in OUTPUTS]
    if kind == "function" and not written:
        problems.append("writes nothing; expected at least one field")
    problems += [
        f"{word!r} is no name of a field: functions return {what} under it"
        for word, what in RESULTS.items()
        if word in {use.name for use in (*read, *written)}
    ]
    if state and scope != "batch":
        problems.append(f"state with scope {scope!r}; a function that keeps state has scope 'batch'")
    try:
        PLAIN_MAPPING.read(state)
    except Wrong as wrong:
        problems.append(f"state; expected {PLAIN_MAPPING.expected} ({wrong})")
    given = {use.name: use for use in read} | dict.fromkeys(needs) | dict.fromkeys(["state"] if state else [])
    options, choices = {}, {}
    for parameter in _parameters(of):
        if parameter.name in given:
            use = given.pop(parameter.name)
            if use is not None and use.optional and parameter.default is Parameter.empty:
                problems.append(f"the optional read {parameter.name!r} needs a default")
        elif parameter.kind is Parameter.KEYWORD_ONLY and parameter.default is not Parameter.empty:
            options[parameter.name] = parameter.default
            if values := _choices(parameter):
                choices[parameter.name] = values
        elif parameter.name not in (("lengths", "mask") if kind == "loss" else ("lengths",)):
            problems.append(
                f"the parameter {parameter.name!r} is neither declared as read nor an option (keyword-only, "
                "with a default)"
            )
    problems += [f"{missing!r} is declared, but it is no parameter of the function" for missing in given]
    if problems:
        raise InputError(Problem(message, where=f"declaration of {name}") for message in problems)
    return FunctionDecl(name, kind, read, written, scope, options, needs, choices, state=dict(state))


def _field_use(name: str, text: str, problems: list[str]) -> FieldUse:
    """`"sample int field=group_id optional"` as a value."""
    words = text.split() if isinstance(text, str) else []
    field = name
    optional = "optional" in words
    rest = [word for word in words[2:] if word != "optional"]
    for word in rest:
        key, _, value = word.partition("=")
        if key == "field" and NAME.fullmatch(value):
            field = value
        else:
            problems.append(f"{name}: {word!r}; expected field=<name> or optional")
    if len(words) < 2 or words[0] not in EXTENTS or words[1] not in DTYPES:
        problems.append(
            f"{name}: {text!r}; expected '<extent> <dtype>' of {'|'.join(EXTENTS)} and {'|'.join(DTYPES)}, "
            "such as 'sample float'"
        )
        return FieldUse(name, field, "sample", "any", optional)
    return FieldUse(name, field, words[0], words[1], optional)  # type: ignore[arg-type]


def _parameters(of: Callable[..., Any]) -> list[Parameter]:
    """The parameters, with evaluated annotations where that is possible."""
    try:
        signature = inspect.signature(of, eval_str=True)
    except (
        NameError,
        AttributeError,
        SyntaxError,
        TypeError,
    ):  # annotations that only a type checker can read
        signature = inspect.signature(of)
    return list(signature.parameters.values())


def _choices(parameter: Parameter) -> tuple[Any, ...]:
    """The values of an option annotated as a `Literal`."""
    return get_args(parameter.annotation) if get_origin(parameter.annotation) is Literal else ()


def _reward(of: Callable[..., Any], use: str) -> FunctionDecl:
    """A reward in TRL's or verl's signature, told apart by its parameters."""
    parameters = _parameters(of)
    names = {parameter.name: parameter for parameter in parameters}
    for parameter in parameters:
        if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.VAR_POSITIONAL):
            raise InputError(
                f"{use}: the parameter {parameter} cannot be given by name; make it an ordinary one"
            )
    if "completions" in names:
        reads, options = _split(parameters, _TRL_FIELDS)
        if "completion_ids" in names:  # the written tokens of each sample are cut out of both
            reads = [read for read in reads if read.name != "completion_ids"]
            reads += [
                FieldUse("tokens", "tokens", "token", "int"),
                FieldUse("loss_mask", "loss_mask", "token", "bool"),
            ]
    elif {"solution_str", "ground_truth"} <= names.keys():
        reads, options = _split(parameters, _VERL_FIELDS)
        reads = [replace(read, optional=True) if read.name == "data_source" else read for read in reads]
    else:
        raise InputError(
            f"{use}({', '.join(names)}): not declared, and no reward's signature either; decorate it with "
            "@realflow.graph.function(reads=..., writes=...), or take f(completions, **columns) or "
            "compute_score(data_source, solution_str, ground_truth, extra_info=None)"
        )
    rest = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    if rest and "completions" in names and "prompts" not in names:  # TRL always gives them
        reads.append(FieldUse("prompts", "prompt", "sample", "any", optional=True))
    return FunctionDecl(use, "reward", tuple(reads), _REWARDS, "sample", options, takes_columns=rest)


def _split(parameters: list[Parameter], fields: Mapping[str, str]) -> tuple[list[FieldUse], dict[str, Any]]:
    """Parameters as reads (a default makes one optional) and options (keyword-only with a default)."""
    reads, options = [], {}
    for parameter in parameters:
        if parameter.kind is Parameter.VAR_KEYWORD:
            continue
        has_default = parameter.default is not Parameter.empty
        if parameter.kind is Parameter.KEYWORD_ONLY and has_default:
            options[parameter.name] = parameter.default
            continue
        field = fields.get(parameter.name, parameter.name)
        dtype: Any = "text" if field == "completion" else "any"
        reads.append(FieldUse(parameter.name, field, "sample", dtype, has_default))
    return reads, options
