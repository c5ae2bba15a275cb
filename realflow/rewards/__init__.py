"""Rewards: built-in ones, and adapters for a user's function in TRL's or verl's signature."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "last_number": "builtin",
        "boxed": "builtin",
        "code": "code",
        "countdown": "countdown",
        "format": "format",
        "gym": "gym",
        "humaneval": "humaneval",
        "math": "math",
        "overlong": "length",
        "weighted": "combine",
    }
)
"""Built-in reward -> the module of this room that it is in."""

RUN_CODE = frozenset({"rewards.code", "rewards.humaneval"})
"""Those that run what a model wrote: they need a machine that can contain it."""
