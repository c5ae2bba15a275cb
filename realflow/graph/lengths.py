"""`lengths:` of a graph: how long prompts and responses are, which only the planner asks.

lengths: {prompt: 300, response: 1200}                                # all alike
lengths: {prompt: {mean: 300, std: 80}, response: {mean: 1200, p90: 2100, max: 4096}}
lengths: {trace: runs/ppo/samples.jsonl}                              # as they were in a former run
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realflow.graph.schema import TEXT, Kind, Section, number, whole
from realflow.graph.types import Call, DataSpec, LengthsSpec, Spread

_KEYS = ("prompt", "response", "trace", "common")
_SPREAD_KEYS = ("mean", "std", "p90", "max")
_TOKENS = number("a number of tokens of at least 1", least=1)
_LENGTH = Kind(
    "a number of tokens, or a mapping with mean and std or p90, such as {mean: 300, std: 80, max: 900}",
    _TOKENS.read,
)

P90 = 1.2815515655446004
"""How many standard deviations above the mean a normal variable stays 9 times of 10."""

WIDEST_P90 = math.exp(P90**2 / 2)
"""The 9th decile of a log-normal variable is nowhere further above its mean (as a factor)."""


def read_lengths(section: Section, folder: Path | None) -> LengthsSpec:
    """The section as a value. A relative trace starts at the folder of the graph file."""
    spec = LengthsSpec(
        prompt=_read_spread(section, "prompt"),
        response=_read_spread(section, "response"),
        trace=_absolute(section.take("trace", TEXT, None), folder),
        common=section.take("common", whole(), 0),
    )
    if spec.prompt is not None and spec.common > spec.prompt.mean:
        section.problem(
            f"found {spec.common}, expected at most the tokens of a prompt, {spec.prompt.mean:g}", "common"
        )
    if spec.trace is not None and "response" in section:
        section.problem("'trace' says how long responses are; remove 'response' or 'trace'", "response")
    if section.sound and not section.items:
        section.problem("is empty; expected prompt and response, or trace")
    section.close(_KEYS)
    return spec


def _absolute(trace: str | None, folder: Path | None) -> str | None:
    if trace is None or folder is None:
        return trace
    return str(folder / Path(trace).expanduser())


def _read_spread(section: Section, key: str) -> Spread | None:
    """A number is a length that all have."""
    if key not in section:
        return None
    if not isinstance(section.items[key], Mapping):
        alike = section.take(key, _LENGTH, None)
        return None if alike is None else Spread(alike)
    inner = section.section(key)
    spread = Spread(
        mean=inner.need("mean", _TOKENS, 1.0),
        std=inner.take("std", number("a number of tokens of at least 0", least=0), None),
        p90=inner.take("p90", _TOKENS, None),
        longest=inner.take("max", whole(1), None),
    )
    inner.close(_SPREAD_KEYS)
    if spread.std is not None and spread.p90 is not None:
        inner.problem("std and p90 both say how far lengths spread; remove one", "p90")
    elif spread.p90 is not None and not 1 <= spread.p90 / spread.mean <= WIDEST_P90:
        inner.problem(
            f"found {spread.p90:g}, expected from the mean, {spread.mean:g}, to {WIDEST_P90:.2f} times it",
            "p90",
        )
    if spread.longest is not None and spread.longest < spread.mean:
        inner.problem(f"found {spread.longest}, expected at least the mean, {spread.mean:g}", "max")
    return spread


def check_trace(section: Section, spec: LengthsSpec) -> None:
    """The trace is there."""
    if spec.trace is not None and not Path(spec.trace).exists():
        section.problem(
            f"{spec.trace}: no such file; expected the folder of a former run, or its samples.jsonl", "trace"
        )


def check_lengths(section: Section, spec: LengthsSpec, calls: Sequence[Call], data: DataSpec) -> None:
    """Lengths that the data or the calls do not allow."""
    rollouts = [call for call in calls if call.sampling is not None]
    if not rollouts and data.tokenize is None:
        section.problem("nothing has tokens: no call generates and the data is not tokenized; remove it")
        return
    if rollouts:
        new = max(call.sampling.max_new_tokens for call in rollouts if call.sampling)
        _check_most(section, "prompt", spec.prompt, data.prompt_tokens, "data.max_length")
        _check_most(section, "response", spec.response, new, "max_new_tokens")
    else:
        means = [spread.mean for spread in (spec.prompt, spec.response) if spread is not None]
        if sum(means) > data.prompt_tokens:
            section.problem(
                f"prompt and response have {sum(means):g} tokens in the mean; expected at most "
                f"{data.prompt_tokens}, to which data.max_length cuts them"
            )


def _check_most(section: Section, key: str, spread: Spread | None, most: int, word: str) -> None:
    if spread is None:
        return
    if spread.mean > most:
        section.problem(f"found {spread.mean:g}, expected at most {most} ({word})", key)
    elif spread.longest is not None and spread.longest > most:
        section.problem(f"found {spread.longest}, expected at most {most} ({word})", key, "max")


def lengths_to_mapping(spec: LengthsSpec) -> dict[str, Any]:
    """Plain values that `read_lengths` reads back."""
    found: dict[str, Any] = {}
    for key, spread in (("prompt", spec.prompt), ("response", spec.response)):
        if spread is not None:
            values = {"mean": spread.mean, "std": spread.std, "p90": spread.p90, "max": spread.longest}
            kept = {name: _plain(value) for name, value in values.items() if value is not None}
            found[key] = kept["mean"] if list(kept) == ["mean"] else kept
    found |= {} if spec.trace is None else {"trace": spec.trace}
    return found | ({"common": spec.common} if spec.common else {})


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value
