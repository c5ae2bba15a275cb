"""`evaluate:` of a graph: held-out prompts that are answered, and judged, every so many steps of a run.

evaluate:
  every: 20 steps
  data: {source: jsonl, path: test.jsonl, fields: {prompt: question, answer: answer}, batch: 100 prompts}
  samples: 4
  temperature: 0.6
  reward: {use: rewards.math}
  keep_best: true

It is a graph of its own with two calls, which run where the rollout runs, on its weights and its engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from realflow.graph.builtins import GENERATE
from realflow.graph.calls import read_options, read_use
from realflow.graph.check import Column, mismatch
from realflow.graph.datamapping import data_to_mapping
from realflow.graph.datasection import read_data
from realflow.graph.schema import FLAG, SECONDS, STEPS, Section, named, nearest, number, whole
from realflow.graph.types import Call, DataSpec, Evaluate, FieldUse, FunctionDecl, Graph, Sampling

EVAL, SCORE = ":eval", ":eval_score"
"""The names of its calls; no user's call can be named so."""

_KEYS = ("every", "data", "samples", "temperature", "top_p", "top_k", "reward", "keep_best")
_REWARD_KEYS = ("use", "options", "reads", "timeout")
_FIELD = named("the name of a field (letters, digits and _)")


def evaluated(calls: Sequence[Call]) -> Call | None:
    """The generate call whose model is evaluated: the one that is trained on, or else the first."""
    rollouts = [call for call in calls if call.op == "generate"]
    trained = {call.reads.get("tokens") for call in calls if call.op == "train"}
    return next((c for c in rollouts if c.writes["tokens"] in trained), rollouts[0] if rollouts else None)


def read_evaluate(section: Section, graph: Graph, folder: Path | None) -> Evaluate | None:
    """The section as a value, for the rest of its graph. None where it cannot be read: that is reported."""
    before = len(section.report.problems)
    rollout = evaluated(graph.calls)
    if rollout is None or rollout.sampling is None:
        section.problem("no call generates, so there is nothing to evaluate; remove it")
        return None
    if graph.max_staleness:
        section.problem("is for synchronous runs: set max_staleness to 0 or remove it")
    every = section.need("every", STEPS, 1)
    data_section = section.section(
        "data", required=True, expected="a mapping that says where prompts come from"
    )
    data = read_data(data_section) if data_section.sound else DataSpec("", {})
    data = data if data.max_length is not None else replace(data, max_length=graph.data.max_length)
    samples = section.take("samples", whole(1), 1)
    sampling = replace(
        rollout.sampling,
        temperature=section.take(
            "temperature", number("a number >= 0 (0 is greedy)", least=0), rollout.sampling.temperature
        ),
        top_p=section.take(
            "top_p", number("a number above 0 and at most 1", above=0, most=1), rollout.sampling.top_p
        ),
        top_k=section.take("top_k", whole(), rollout.sampling.top_k),
        stages=(),
    )
    draws = _draws(rollout, sampling, samples, data)
    scores = _read_reward(section.section("reward", required=True), draws, data, folder)
    keep_best = section.take("keep_best", FLAG, False)
    section.close(_KEYS)
    if data_section.sound:
        _check_data(data_section, data, draws, graph.data.prompt_tokens)
    if scores is None or data.batch is None or len(section.report.problems) > before:
        return None
    columns = _columns(draws, data, scores.decl)
    return Evaluate(
        every,
        keep_best,
        Graph(
            name=graph.name,
            models=graph.models,
            data=data,
            calls=(draws, scores),
            steps=graph.steps,
            prompts=data.batch.count,
            samples=samples,
            seed=graph.seed,
            extents={name: column.extent for name, column in columns.items()},
            dtypes={name: column.dtype for name, column in columns.items()},
            folder=str(folder) if folder is not None and _needs_folder(data, scores) else "",
        ),
    )


def _draws(rollout: Call, sampling: Sampling, samples: int, data: DataSpec) -> Call:
    """The call that answers: as the rollout does, into fields of its own."""
    reads = {"prompt": rollout.reads["prompt"]}
    if "draw_id" in data.fields:
        reads["draw_id"] = "draw_id"
    return Call(
        EVAL,
        "generate",
        GENERATE,
        model=rollout.model,
        reads=reads,
        writes={use.name: f"{EVAL}.{use.field}" for use in GENERATE.writes},
        batch=data.batch,
        samples=samples,
        sampling=sampling,
        chat=rollout.chat,
    )


def _read_reward(section: Section, draws: Call, data: DataSpec, folder: Path | None) -> Call | None:
    """The call that judges."""
    if not section.sound:
        return None
    decl = read_use(section, "function", folder)
    if decl is None:
        return None
    written = [(use.extent, use.dtype) for use in decl.writes]
    if written != [("sample", "float")] or decl.state:
        section.problem(
            f"{decl.name} is no reward: expected a function without state that writes one number for each "
            "sample, such as rewards.last_number",
            "use",
        )
        return None
    if decl.takes_columns:
        known = {use.name for use in decl.reads}
        more = (FieldUse(name, name, "sample", "any", optional=True) for name in data.fields)
        decl = replace(decl, reads=(*decl.reads, *(use for use in more if use.name not in known)))
    inner = section.section("reads")
    fields = {use.name: inner.take(use.name, _FIELD, use.field) for use in decl.reads}
    inner.close(fields)
    reads = _wired(section, decl, fields, draws, data)
    options = read_options(section, decl)
    timeout = section.take("timeout", SECONDS, 60.0)
    section.close(_REWARD_KEYS)
    return Call(SCORE, "function", decl, reads=reads, options=options, timeout=timeout)


def _wired(
    section: Section, decl: FunctionDecl, fields: Mapping[str, str], draws: Call, data: DataSpec
) -> dict[str, str]:
    """What the reward reads, by the names that fields have in the evaluation."""
    columns = _columns(draws, data, decl)
    own = {use.field: draws.writes[use.name] for use in GENERATE.writes}
    reads = {}
    for use in decl.reads:
        name = own.get(fields[use.name], fields[use.name])
        if name not in columns:
            if not use.optional:
                hint = nearest(fields[use.name], [*own, *data.fields])
                section.problem(f"reads the field {fields[use.name]!r}, which is not in its data; {hint}")
            continue
        reads[use.name] = name
        if message := mismatch(use, columns[name]):
            section.problem(f"reads the field {fields[use.name]!r} {message}")
    return reads


def _columns(draws: Call, data: DataSpec, decl: FunctionDecl) -> dict[str, Column]:
    """Every field of an evaluation."""
    wanted = {use.field: use.dtype for use in decl.reads}
    found = {
        name: Column(name, "data", "prompt", wanted.get(name, "any"), ("evaluate", "data", "fields", name))
        for name in data.fields
    }
    for use in GENERATE.writes:
        name = draws.writes[use.name]
        found[name] = Column(name, EVAL, use.extent, use.dtype, ("evaluate",))
    return found


def _check_data(section: Section, data: DataSpec, draws: Call, longest: int) -> None:
    if data.batch is None and "batch" not in section:
        section.problem("'batch' is missing; it says how many prompts are answered, such as '100 prompts'")
    if data.batch is not None and data.batch.unit != "prompts":
        section.problem(f"found {data.batch}, expected a number of prompts", "batch")
    if data.tokenize is not None:
        section.problem("prompts are answered here; remove 'tokenize'", "tokenize")
    if data.fields and draws.reads["prompt"] not in data.fields:
        section.problem(f"the rollout reads the prompt {draws.reads['prompt']!r}; name its column", "fields")
    if data.prompt_tokens > longest:
        section.problem(
            f"found {data.prompt_tokens}, expected at most {longest} (data.max_length): the rollout's caches "
            "hold no longer prompts",
            "max_length",
        )


def _needs_folder(data: DataSpec, scores: Call) -> bool:
    parts = data.parts
    return ":" in scores.decl.name or any(
        ":" in part.source or (part.path is not None and not Path(part.path).is_absolute()) for part in parts
    )


def evaluate_to_mapping(spec: Evaluate) -> dict[str, Any]:
    """Plain values that `read_evaluate` reads back."""
    draws, scores = spec.graph.calls
    assert draws.sampling is not None
    own = {name: use.field for use in GENERATE.writes for name in [draws.writes[use.name]]}
    declared = {use.name: use.field for use in scores.decl.reads}
    reads = {name: own.get(field, field) for name, field in scores.reads.items()}
    renamed = {name: field for name, field in reads.items() if declared[name] != field}
    defaults = scores.decl.options
    options = {name: value for name, value in scores.options.items() if value != defaults[name]}
    reward: dict[str, Any] = {"use": scores.decl.name, "timeout": scores.timeout}
    reward |= ({"options": options} if options else {}) | ({"reads": renamed} if renamed else {})
    return {
        "every": f"{spec.every} steps",
        "data": data_to_mapping(spec.graph.data),
        "samples": spec.graph.samples,
        **{name: getattr(draws.sampling, name) for name in ("temperature", "top_p", "top_k")},
        "reward": reward,
        "keep_best": spec.keep_best,
    }
