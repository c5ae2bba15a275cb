"""The data section as plain values again, and in a few words."""

from __future__ import annotations

from typing import Any

from realflow.graph.types import DataSpec


def data_to_mapping(data: DataSpec) -> dict[str, Any]:
    """Plain values that `read_data` reads back. Defaults are left out."""
    if data.sources:
        result: dict[str, Any] = {
            "sources": [
                {"name": part.name, "weight": part.weight, **_one_mapping(part.data)} for part in data.sources
            ]
        }
    else:
        result = _one_mapping(data)
    result |= _changed(data, "shuffle", "tokenize", "max_length", "over", "system", "chat")
    if data.batch is not None:
        result["batch"] = str(data.batch)
    return result


def _one_mapping(data: DataSpec) -> dict[str, Any]:
    result: dict[str, Any] = {
        "source": data.source,
        **_changed(data, "task", "path", "options", "size", "split_name"),
        "fields": dict(data.fields),
    }
    result |= _changed(data, "unique")
    if data.test or data.use != "train":
        result["split"] = {"test": data.test, "use": data.use}
    return result


def _changed(data: DataSpec, *names: str) -> dict[str, Any]:
    default = DataSpec("", {})
    return {name: getattr(data, name) for name in names if getattr(data, name) != getattr(default, name)}


def source_line(data: DataSpec) -> str:
    """The sources in a few words, such as `reasoning_gym: chain_sum`."""
    if data.sources:
        total = sum(part.weight for part in data.sources)
        return ", ".join(f"{part.weight / total:.0%} {part.name}" for part in data.sources)
    told = data.task or data.path
    return f"{data.source}: {told}" if told else data.source
