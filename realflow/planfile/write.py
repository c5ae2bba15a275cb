"""Writing a plan as YAML that a person can read and edit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from realflow.errors import InputError, Problem
from realflow.graph import graph_to_mapping
from realflow.planfile.flags import OF_TRAINING
from realflow.planfile.ranks import format_ranks
from realflow.planfile.types import (
    AT,
    FORMAT,
    SPARE,
    CallPlan,
    Cluster,
    Node,
    Plan,
    ReallocPlan,
    TimelineEntry,
)

_LIST_LIMIT = 16  # longer sets of ranks are written as ranges
# Text that stays text in any YAML dialect; all other text is quoted, because the dumper's own
# rules are those of YAML 1.1, where `1e-5` is text and `on` is not.
_PLAIN = re.compile(r"[A-Za-z_][\w./:-]*( [A-Za-z_][\w./-]*)*|\d+ [a-z]+|\d+-\d+|[\w./-]*/[\w./-]+", re.ASCII)
_UNUSED = {
    "generate": OF_TRAINING,
    "infer": ("slots", *OF_TRAINING),
    "train": ("slots",),
    "function": ("slots", "micro_batch_tokens", "after", *OF_TRAINING),
}
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


class _Flow(dict[Any, Any]):
    """A mapping written on one line."""


class _FlowList(list[Any]):
    """A list written on one line."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not value.endswith(":")
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)
_Dumper.add_representer(
    _Flow, lambda dumper, value: dumper.represent_mapping("tag:yaml.org,2002:map", value, flow_style=True)
)
_Dumper.add_representer(
    _FlowList,
    lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True),
)


def plan_to_yaml(plan: Plan) -> str:
    """A plan as YAML; `parse_plan` reads exactly this plan back."""
    ops = {call.name: call.op for call in plan.graph.calls}
    count = plan.world_size
    where = f"{count} device{'s' * (count != 1)}"
    head = (
        f"# RealFlow plan: graph {plan.graph.name} on {where}. It may be edited by hand:\n"
        "# `realflow explain FILE` checks and shows it, `realflow run FILE` runs it.\n"
    )
    sections: list[tuple[str, dict[str, Any]]] = [
        (
            "",
            {"format": FORMAT},
        ),
        (
            "Ranks number the devices node by node; `local` is the machine that the run starts on.",
            {"cluster": _cluster(plan.cluster)},
        ),
        (
            "Where and how each call runs. A layout is data x tensor x pipeline; micro_batch_tokens is the\n"
            "# budget of a packed micro-batch, slots the sequences that a replica decodes at once. Weights\n"
            "# that one call uses are kept after it, offloaded to the host or freed until they come again.",
            {"calls": {name: _call(call, ops.get(name, "generate")) for name, call in plan.calls.items()}},
        ),
        (
            "Weights that move after an optimizer step, to calls whose layout lacks them, in each step.",
            {"reallocs": [_realloc(realloc) for realloc in plan.reallocs]},
        ),
        (
            "Bytes of each rank by cause, at the worst moment (`at`: the call under way), for the longest\n"
            "# prompts and responses that may come.",
            {"memory": _memory(plan)},
        ),
        (
            "What the planner expects; null where nothing was estimated.",
            {
                "predicted": {
                    "step_seconds": plan.step_seconds,
                    "lower_bound_seconds": plan.lower_bound_seconds,
                    "gap": plan.gap,
                    "timeline": [_entry(entry) for entry in plan.timeline],
                }
            },
        ),
        (
            "A dispatch may take factor x its predicted seconds, but at least floor_seconds.",
            {"deadline": {"factor": plan.deadline_factor, "floor_seconds": plan.deadline_floor_seconds}},
        ),
        (
            "What the plan was made from, and what is worth knowing.",
            {
                "cards": dict(plan.cards),
                "hashes": dict(plan.hashes),
                "notes": list(plan.notes),
                "extra": dict(plan.extra),
            },
        ),
        (
            "The graph, resolved: every value stands where it is used. Its params are as they were given:\n"
            "# editing them changes nothing.",
            {"graph": graph_to_mapping(plan.graph)},
        ),
    ]
    parts = [(f"# {comment}\n" if comment else "") + _dump(values) for comment, values in sections]
    return head + "\n".join(parts)


def write_plan(plan: Plan, path: Path | str) -> Path:
    """Write a plan file beside its place and rename it there. Raises InputError where it cannot be."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(plan_to_yaml(plan), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(Problem(f"cannot be written ({error.strerror})", file=str(path))) from error
    return path


def _dump(values: Mapping[str, Any]) -> str:
    text = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=False
    )
    assert isinstance(text, str)
    return text


def _ranks(ranks: tuple[int, ...]) -> Any:
    return _FlowList(ranks) if len(ranks) <= _LIST_LIMIT else format_ranks(ranks)


def _cluster(cluster: Cluster) -> dict[str, Any]:
    return {"nodes": [_node(node) for node in cluster.nodes]}


def _node(node: Node) -> _Flow:
    speeds = {"inside": node.inside, "between": node.between}
    given = {key: speed for key, speed in speeds.items() if speed is not None}
    return _Flow(
        name=node.name, devices=node.devices, kind=node.kind, memory_bytes=node.memory_bytes, **given
    )


def _call(call: CallPlan, op: str) -> dict[str, Any]:
    values = {
        "ranks": _ranks(call.ranks),
        "layout": str(call.layout),
        "engine": call.engine,
        "micro_batch_tokens": call.micro_batch_tokens,
        "slots": call.slots,
        "after": call.after,
        **{key: getattr(call, key) for key in OF_TRAINING},
        "predicted_seconds": call.predicted_seconds,
    }
    for key in _UNUSED[op]:
        if values[key] == getattr(CallPlan, key):  # a default that says nothing
            del values[key]
    return values


def _realloc(realloc: ReallocPlan) -> dict[str, Any]:
    return {
        "model": realloc.model,
        "source": realloc.source,
        **({"follower": realloc.follower} if realloc.follower else {"destination": realloc.destination}),
        "bytes": realloc.bytes,
        "lower_bound_bytes": realloc.lower_bound_bytes,
        "predicted_seconds": realloc.predicted_seconds,
    }


def _entry(entry: TimelineEntry) -> _Flow:
    return _Flow(what=entry.what, ranks=_ranks(entry.ranks), start=entry.start, end=entry.end)


def _memory(plan: Plan) -> dict[Any, Any]:
    """Ranks that hold the same are written as one row, such as `0-7`."""
    rows: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    limits = [node.memory_bytes for node in plan.cluster.nodes for _ in range(node.devices)]
    for rank in sorted(plan.memory):
        causes, limit = plan.memory[rank], limits[rank]
        row: dict[str, Any] = {AT: plan.moments[rank]} if rank in plan.moments else {}
        row |= causes
        if limit is not None:
            row[SPARE] = limit - sum(causes.values())
        rows.setdefault(tuple(row.items()), []).append(rank)
    return {
        (ranks[0] if len(ranks) == 1 else format_ranks(ranks)): _Flow(causes)
        for causes, ranks in rows.items()
    }
