"""Kinds of devices: those that the runtime knows, and the planner's catalogue's names for them."""

from __future__ import annotations

from collections.abc import Mapping

RUNTIME_OF: Mapping[str, str] = {
    "cpu": "cpu",
    "cuda": "cuda",
    **dict.fromkeys(
        ("a100-40gb", "a100-80gb", "a800", "h100", "h800", "h200", "b200", "l40s", "mi300x"), "cuda"
    ),
}
"""Kind of a cluster's node -> what the runtime runs on it. The planner's catalogue has their numbers."""


def runtime_kind(kind: str) -> str:
    """`cpu` or `cuda`."""
    return RUNTIME_OF[kind]
