"""Calls without a model: pack the fields, call the function, check and unpack what it returns.

Built-in or user's, declared or a reward in TRL's or verl's signature: what goes wrong in a function
ends in one `FunctionError` that names the call, the function and, where known, the sample.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from realflow.data.batch import pack, to_tokens
from realflow.engines.values import BadValue, is_json, kind, plain, returned
from realflow.errors import RealFlowError, RunError
from realflow.graph.builtins import BUILTINS
from realflow.graph.functions import load_function
from realflow.graph.types import Call, Dtype, Extent, FieldUse
from realflow.rewards import MODULES, adapt


class FunctionError(RunError):
    """A function of the graph failed. `call` and `function` name it, `sample` is a sample id or None."""

    def __init__(self, call: str, function: str, message: str, sample: int | None = None) -> None:
        self.call, self.function, self.sample = call, function, sample
        place = "" if sample is None else f"sample {sample}: "
        super().__init__(f"call {call!r}: {function}: {place}{message}")


@dataclass
class Progress:
    """What a watchdog reads from another thread: the sample id that a function is working on."""

    sample: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a function call came to: graph field -> a value for each sample; metrics of the step, by their
    whole names; and what it keeps, where its declaration has `state`."""

    fields: dict[str, list[Any]]
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def load_callable(use: str, base: Path | None = None) -> Callable[..., Any]:
    """The function that a graph calls `use`: a built-in such as `rewards.boxed`, or
    `package.module:function`, imported with the folder `base` on the path.

    Raises InputError for an unknown name or a failing import.
    """
    if use not in BUILTINS or "." not in use:
        return load_function(use, base)
    room, _, name = use.partition(".")
    module = f"realflow.rewards.{MODULES[name]}" if room == "rewards" else f"realflow.algorithms.{room}"
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def run_function(
    fn: Callable[..., Any],
    call: Call,
    ids: Sequence[int],
    values: Mapping[str, Sequence[Any]],
    lengths: Sequence[int],
    extents: Mapping[str, Extent],
    dtypes: Mapping[str, Dtype],
    *,
    progress: Progress | None = None,
) -> dict[str, list[Any]]:
    """The fields of `run_call`, for a call that keeps no state."""
    return run_call(fn, call, ids, values, lengths, extents, dtypes, progress=progress).fields


def run_call(
    fn: Callable[..., Any],
    call: Call,
    ids: Sequence[int],
    values: Mapping[str, Sequence[Any]],
    lengths: Sequence[int],
    extents: Mapping[str, Extent],
    dtypes: Mapping[str, Dtype],
    *,
    progress: Progress | None = None,
    state: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run a function call on samples `ids`.

    `values` holds for each graph field that the call reads an entry for each sample (see "Values of
    one sample" in docs/design/whole-path.md), `lengths` the tokens of each sample; `extents` and
    `dtypes` describe graph fields. `progress.sample` follows the function from sample to sample
    where it can be followed, and is None afterwards. `state` is what the function kept, where its
    declaration has any.

    Raises FunctionError when the function raises, or returns the wrong number of values, NaN,
    infinity or another type. Of a reward, None is allowed: it does not apply to that sample.
    """
    run = _Run(call, tuple(ids), tuple(lengths), progress or Progress())
    if not run.ids:
        return Outcome({call.writes[use.name]: [] for use in call.decl.writes}, state=dict(state or {}))
    try:
        if call.decl.kind == "reward":
            work = run.reward(fn, values)
        else:
            work = run.declared(fn, values, extents, dtypes, state or {})
        result = run.guarded(work)
        return run.checked(result)
    except BadValue as error:
        raise run.error(str(error), error.index) from None


@dataclass(frozen=True)
class _Run:
    """One execution of a call on samples `ids`, of `lengths` tokens each."""

    call: Call
    ids: tuple[int, ...]
    lengths: tuple[int, ...]
    progress: Progress

    def error(self, message: str, index: int | None = None) -> FunctionError:
        """What to raise about the sample at `index`, or about all of them."""
        if index is None:
            shown = ", ".join(map(str, self.ids[:4])) + (", ..." if len(self.ids) > 4 else "")
            message = f"samples {shown}: {message}" if len(self.ids) > 1 else f"sample {shown}: {message}"
        sample = None if index is None else self.ids[index]
        return FunctionError(self.call.name, self.call.decl.name, message, sample)

    def started(self, index: int | None) -> None:
        """The function now works on the sample at `index` (None: on no single one)."""
        self.progress.sample = None if index is None else self.ids[index]

    def declared(
        self,
        fn: Callable[..., Any],
        values: Mapping[str, Sequence[Any]],
        extents: Mapping[str, Extent],
        dtypes: Mapping[str, Dtype],
        state: Mapping[str, Any],
    ) -> Callable[[], Any]:
        """A declared function, ready to be called on packed fields."""
        given: dict[str, Any] = {"state": dict(state)} if self.call.decl.state else {}
        for use in self.call.decl.reads:
            field = self.call.reads.get(use.name)  # an optional read that nothing writes is not there
            if field is not None:
                given[use.name] = self._packed(use, values[field], extents[field], dtypes[field])
        if "lengths" in inspect.signature(fn).parameters and "lengths" not in given:
            given["lengths"] = torch.tensor(self.lengths, dtype=torch.int64)
        return partial(fn, **given, **self._options())

    def reward(self, fn: Callable[..., Any], values: Mapping[str, Sequence[Any]]) -> Callable[[], Any]:
        """A reward in TRL's or verl's signature, ready to be called on columns."""
        columns = {name: list(values[field]) for name, field in self.call.reads.items()}
        if any(use.extent == "token" for use in self.call.decl.reads):  # for TRL's completion_ids
            rows = zip(columns.pop("tokens"), columns.pop("loss_mask"), strict=True)
            columns["completion_ids"] = [tokens[mask].tolist() for tokens, mask in rows]
        fn = partial(fn, **self._options())
        if "solution_str" not in columns:
            return partial(adapt.call_trl, fn, columns, self.started)
        columns.setdefault("data_source", [""] * len(self.ids))  # verl's functions always take one
        return partial(adapt.call_verl, fn, columns, self.started)

    def guarded(self, work: Callable[[], Any]) -> Any:
        """The result of `work`; whatever it raises becomes a FunctionError with its traceback."""
        self.progress.sample = None
        try:
            return work()
        except (Exception, SystemExit) as error:  # a user's function raises what it likes
            sample = self.progress.sample
            index = None if sample is None else self.ids.index(sample)
            raise self.error(f"raised {_told(error)}", index) from error
        finally:
            self.progress.sample = None

    def checked(self, result: Any) -> Outcome:
        """The result, each part as its declaration says. Raises BadValue."""
        writes, state = self.call.decl.writes, self.call.decl.state
        names = [use.name for use in writes] + (["state"] if state else [])
        if not isinstance(result, Mapping):
            if len(names) != 1 or state:
                raise BadValue(f"returned {kind(result)}; expected a dict with {', '.join(names)}")
            result = {names[0]: result}
        if set(result) - {"metrics"} != set(names):
            found = ", ".join(map(str, result)) or "nothing"
            raise BadValue(f"returned a dict with {found}; expected {', '.join(names)}")
        fields = {}
        for use in writes:
            optional = self.call.decl.kind == "reward" or use.name == "rewards"
            fields[self.call.writes[use.name]] = returned(
                use, result[use.name], self.lengths, optional=optional
            )
        kept = _kept(result["state"], state) if state else {}
        return Outcome(fields, _metrics(result.get("metrics", {})), kept)

    def _packed(self, use: FieldUse, column: Sequence[Any], extent: Extent, dtype: Dtype) -> Any:
        """A column in the form that the function's declaration asks for. Raises BadValue."""
        name = use.name
        if extent != "token":
            column, dtype = [self._given(use, value, index) for index, value in enumerate(column)], use.dtype
        packed = pack(self.ids, self.lengths, {name: column}, {name: extent}, {name: dtype}).fields[name]
        if isinstance(packed, list):
            return adapt.WatchedList(packed, self.started)
        if use.extent == "token" and extent != "token":
            return to_tokens(packed, torch.tensor(self.lengths, dtype=torch.int64))
        return packed

    def _given(self, use: FieldUse, value: Any, index: int) -> Any:
        """A value of a sample for the read `use`; None stands for a missing float."""
        if use.dtype == "any" or (value is None and use.dtype == "float"):
            return value
        try:
            return plain(value, use.dtype)
        except BadValue as error:
            raise BadValue(f"was to be given for {use.name} {error}", index) from None

    def _options(self) -> dict[str, Any]:
        """The options that are the function's own (not the engine's, such as `normalise`)."""
        return {name: value for name, value in self.call.options.items() if name in self.call.decl.options}


def _metrics(found: Any) -> dict[str, float]:
    """Metrics as a function returned them: name -> finite number. Raises BadValue."""
    if not isinstance(found, Mapping):
        raise BadValue(f"returned {kind(found)} for metrics; expected a dict from names to numbers")
    numbers = {}
    for name, value in found.items():
        if not isinstance(name, str) or name in ("", "step", "time"):
            raise BadValue(f"returned metrics with the name {name!r}; expected text, but not step or time")
        try:
            numbers[name] = plain(value, "float")
        except BadValue as error:
            raise BadValue(f"returned for the metric {name!r} {error}") from None
        if not math.isfinite(numbers[name]):
            raise BadValue(f"returned {numbers[name]} for the metric {name!r}; expected a finite number")
    return numbers


def _kept(found: Any, declared: Mapping[str, Any]) -> dict[str, Any]:
    """A state as a function returned it: it goes through messages and into JSON. Raises BadValue."""
    if not isinstance(found, Mapping) or set(found) != set(declared):
        told = f"a dict with {', '.join(map(str, found))}" if isinstance(found, Mapping) else kind(found)
        raise BadValue(f"returned {told} for state; expected a dict with {', '.join(declared)}")
    kept = {}
    for name, value in found.items():
        scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
        kept[name] = value.item() if scalar else value
        if not is_json(kept[name]):
            raise BadValue(f"returned {kind(value)} for {name!r} of state; expected plain values")
        try:
            json.dumps(kept[name], allow_nan=False)
        except ValueError:
            raise BadValue(f"returned {kind(value)} for {name!r} of state; expected finite numbers") from None
    return kept


def _told(error: BaseException) -> str:
    """An error as people read it: our own by its message, others with the traceback from the function on."""
    if isinstance(error, RealFlowError):
        return str(error)
    ours = {__file__, adapt.__file__}
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    lines = traceback.format_exception(type(error), error, trace or error.__traceback__)
    return f"{type(error).__name__}: {error}\n{''.join(lines).rstrip()}"
