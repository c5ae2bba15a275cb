"""A graph file, text or mapping read into a checked `Graph`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from realflow.errors import InputError, Problem
from realflow.graph.calls import read_calls
from realflow.graph.check import wire
from realflow.graph.datamapping import data_to_mapping
from realflow.graph.datasection import check_data_path, read_data
from realflow.graph.evaluate import evaluate_to_mapping, read_evaluate
from realflow.graph.filekinds import refuse_other
from realflow.graph.follows import check_follows
from realflow.graph.heads import check_heads
from realflow.graph.lengths import check_lengths, check_trace, lengths_to_mapping, read_lengths
from realflow.graph.params import apply_params, escape
from realflow.graph.refill import refill_to_mapping
from realflow.graph.refillwiring import wire_refill
from realflow.graph.retokenize import retokenize_to_mapping
from realflow.graph.schema import FILE_NAME, PLAIN, STEPS, TEXT, Report, Section, named, whole
from realflow.graph.sections import read_models
from realflow.graph.sizes import check_models, check_sizes
from realflow.graph.stages import plain_limits
from realflow.graph.types import Call, DataSpec, Graph, LoraSpec, ModelSpec, OptimizerSpec, Sampling
from realflow.graph.yamlfile import Document, load_yaml, parse_yaml

TOP_KEYS = (
    "name",
    "params",
    "models",
    "data",
    "calls",
    "max_staleness",
    "steps",
    "seed",
    "checkpoint",
    "lengths",
    "folder",
    "evaluate",
)
_NAME = named("a name of letters, digits, '.', '_' and '-'", FILE_NAME)


def load_graph(source: Path | str | Mapping[str, Any] | Document, overrides: Sequence[str] = ()) -> Graph:
    """Read and check a graph.

    `source` is a file, YAML text, plain values, or a part of a document that was read before (a
    graph inside a plan). `overrides` are texts `key=value` that set keys under `params`. User
    functions are imported, with the file's folder on the import path. The path of a model that lies
    beside the file becomes a whole one; others are looked for from the current folder.

    Raises InputError with every problem found, in the order of the file.
    """
    problems: list[Problem] = []
    document = _read(source, problems)
    refuse_other(document, "graph")
    if not isinstance(document.value, Mapping):
        found = "is empty" if document.value is None else "holds no mapping"
        raise InputError(
            [*problems, document.problem((), f"{found}; expected a graph (name, models, data, calls, steps)")]
        )
    document, origins = apply_params(document, overrides, problems)
    report = Report(document, problems, origins)
    folder = source.resolve().parent if isinstance(source, Path) else None
    graph = _graph(Section(report, (), document.value, True), report, folder, here=folder is not None)
    report.finish()
    return graph


def _read(source: Path | str | Mapping[str, Any] | Document, problems: list[Problem]) -> Document:
    if isinstance(source, Document):
        return source
    if isinstance(source, Path):
        return load_yaml(source, problems)
    if isinstance(source, Mapping):
        return Document(source)
    if "\n" not in source and source.endswith((".yaml", ".yml")):
        raise InputError(
            f"{source!r} is a path, expected YAML text; give pathlib.Path({source!r}) to read the file"
        )
    return parse_yaml(source, "", problems)


def _graph(top: Section, report: Report, folder: Path | None, *, here: bool) -> Graph:
    """`here`: the graph is a file of this machine, so that the files it names must be here too."""
    name = top.need("name", _NAME, "")
    given = top.take("folder", TEXT, None)
    if given is not None:
        folder = Path(given)
    models_section = top.section("models", required=True, expected="a mapping from names to models")
    models = {name: _beside(model, folder) for name, model in read_models(models_section).items()}
    data_section = top.section("data", required=True, expected="a mapping that says where prompts come from")
    data = read_data(data_section)
    calls_section = top.section("calls", required=True, expected="a mapping from names to calls")
    drafts = read_calls(calls_section, models, folder)
    checkpoint = top.section("checkpoint")
    every = checkpoint.need("every", STEPS, None) if "checkpoint" in top else None
    keep = checkpoint.take("keep", whole(1), Graph.checkpoint_keep)
    checkpoint.close(("every", "keep"))
    steps = top.need("steps", whole(1), 1)
    seed = top.take("seed", whole(0, 2**63 - 1), 1)
    staleness = top.take("max_staleness", whole(), 0)
    lengths_section = top.section("lengths", expected="a mapping with prompt and response, or with trace")
    lengths = read_lengths(lengths_section, folder) if "lengths" in top else None
    params = _params(top)
    evaluate_section = top.section("evaluate", expected="a mapping with every, data and reward")
    top.close(TOP_KEYS)

    # What could not be read is reported; what follows from it alone would hide it.
    known = data_section.sound and ("fields" in data_section or bool(data.sources))
    complete = calls_section.sound and bool(drafts) and all(draft.sound for draft in drafts)
    wiring = wire(drafts, data, report, known=known)
    calls = wire_refill(wiring.calls, wiring.columns, report, complete=complete and known)
    wiring = replace(wiring, calls=calls)
    prompts, samples = 1, 1
    if complete:
        check_models(models, wiring.calls, data, report)
        check_heads(models, wiring.calls, report)
        check_follows(models, wiring.calls, report)
        if data_section.sound:
            prompts, samples = check_sizes(wiring.calls, data, report)
    if lengths is not None and complete and data_section.sound:
        check_lengths(lengths_section, lengths, wiring.calls, data)
    if here and folder is not None:
        check_data_path(data_section, data, folder)
        if lengths is not None:
            check_trace(lengths_section, lengths)
    graph = Graph(
        name=name,
        models=models,
        data=data,
        calls=wiring.calls,
        steps=steps,
        prompts=prompts,
        samples=samples,
        seed=seed,
        max_staleness=staleness,
        checkpoint_every=every,
        checkpoint_keep=keep,
        lengths=lengths,
        params=params,
        extents={name: column.extent for name, column in wiring.columns.items()},
        dtypes={name: column.dtype for name, column in wiring.columns.items()},
        folder=str(folder) if folder is not None and _needs_folder(data, wiring.calls) else "",
    )
    if "evaluate" not in top or not complete or not data_section.sound:
        return graph
    evaluate = read_evaluate(evaluate_section, graph, folder)
    if evaluate is None:
        return graph
    if here and folder is not None:
        check_data_path(evaluate_section.section("data"), evaluate.graph.data, folder)
    return replace(graph, evaluate=evaluate, folder=graph.folder or evaluate.graph.folder)


def _params(top: Section) -> dict[str, Any]:
    section = top.section("params", expected="a mapping from names to values")
    names = section.names(named("a name of letters, digits and _"))
    return {name: section.take(name, PLAIN, None) for name in names}


def _beside(model: ModelSpec, folder: Path | None) -> ModelSpec:
    """The model with its whole path where it is a folder beside the graph file."""
    if folder is None or not model.path or not (folder / model.path / "config.json").is_file():
        return model
    return replace(model, path=str((folder / model.path).resolve()))


def _needs_folder(data: DataSpec, calls: Sequence[Call]) -> bool:
    """Whether anything is imported from, or read beside, the graph file."""
    for part in data.parts:
        if _users(part.source) or (part.path is not None and not Path(part.path).is_absolute()):
            return True
    deciders = [call.refill.call for call in calls if call.refill is not None]
    return any(_users(call.decl.name) for call in (*calls, *deciders))


def _users(name: str) -> bool:
    """Whether a function is the user's own: it may lie beside the graph file."""
    return ":" in name and not name.startswith("realflow.")


def graph_to_mapping(graph: Graph) -> dict[str, Any]:
    """Plain values that `load_graph` reads back into an equal graph. Defaults are left out, params
    are kept although everything is filled in."""
    result: dict[str, Any] = {"name": graph.name}
    if graph.params:
        result["params"] = dict(graph.params)
    result["models"] = {name: _model_mapping(model) for name, model in graph.models.items()}
    result["data"] = data_to_mapping(graph.data)
    result["calls"] = {call.name: _call_mapping(call) for call in graph.calls}
    result |= {"max_staleness": graph.max_staleness, "steps": graph.steps, "seed": graph.seed}
    if graph.checkpoint_every is not None:
        result["checkpoint"] = {"every": f"{graph.checkpoint_every} steps", "keep": graph.checkpoint_keep}
    if graph.lengths is not None:
        result["lengths"] = lengths_to_mapping(graph.lengths)
    if graph.evaluate is not None:
        result["evaluate"] = evaluate_to_mapping(graph.evaluate)
    if graph.folder:
        result["folder"] = graph.folder
    escaped: dict[str, Any] = escape(result)
    return escaped


def _changed(value: Any, default: Any, *names: str) -> dict[str, Any]:
    """The attributes of a value that differ from those of a default one."""
    return {name: getattr(value, name) for name in names if getattr(value, name) != getattr(default, name)}


def _model_mapping(model: ModelSpec) -> dict[str, Any]:
    result: dict[str, Any] = {"path": model.path, "dtype": model.dtype}
    result |= _changed(model, ModelSpec("", ""), "head")
    if model.follows is not None:
        result["follows"] = {"model": model.follows.model, "decay": model.follows.decay}
        if model.follows.every != 1:
            result["follows"]["every"] = f"{model.follows.every} steps"
    if model.optimizer is not None:
        spec = model.optimizer
        changed = _changed(
            spec, OptimizerSpec(), *(key for key in OptimizerSpec.__dataclass_fields__ if key != "name")
        )
        result["optimizer"] = {"name": spec.name, "lr": spec.lr} | changed
    if model.lora is not None:
        result["lora"] = {"rank": model.lora.rank, "alpha": model.lora.alpha}
        if model.lora.targets:
            result["lora"]["targets"] = list(model.lora.targets)
        result["lora"] |= _changed(model.lora, LoraSpec(1, 1), "save")
    return result


def _call_mapping(call: Call) -> dict[str, Any]:
    default = Call("", "function", call.decl)
    result: dict[str, Any] = ({"model": call.model} if call.model else {}) | {"op": call.op}
    if call.op != "generate":
        result["use"] = call.decl.name
    if call.batch is not None:
        result |= {"batch": str(call.batch), "samples": call.samples}
    if call.sampling is not None:
        result["max_new_tokens"] = plain_limits(
            call.sampling.stages or ((None, call.sampling.max_new_tokens),)
        )
        result |= _changed(call.sampling, Sampling(1), "temperature", "top_k", "top_p", "stop")
    result |= _changed(call, default, "chat", "minibatches", "timeout")
    if call.refill is not None:
        result["refill"] = refill_to_mapping(call.refill)
    if call.retokenize is not None:
        result["retokenize"] = retokenize_to_mapping(call.retokenize)
    if call.every is not None:
        result["every"] = f"{call.every} steps"
    options = {key: value for key, value in call.options.items() if key in call.decl.options}
    if changed := {key: value for key, value in options.items() if _differs(value, call.decl.options[key])}:
        result["options"] = changed
    if call.op == "train" and call.options.get("normalise") != call.decl.normalise:
        result["normalise"] = call.options["normalise"]
    for key, uses in (("reads", call.decl.reads), ("writes", call.decl.writes)):
        fields = {use.name: use.field for use in uses}
        renamed = {
            name: field for name, field in getattr(call, key).items() if fields.get(name, name) != field
        }
        if renamed:
            result[key] = renamed
    return result


def _differs(value: Any, default: Any) -> bool:
    return type(value) is not type(default) or value != default
