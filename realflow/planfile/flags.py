"""The words that people use for what a call does beside its layout: `zero_bubble`, `recompute`, `offload`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from realflow.planfile.types import CallPlan

FLAGS: Mapping[str, tuple[str, Any]] = {
    "1f1b": ("schedule", "1f1b"),
    "zero_bubble": ("schedule", "zero_bubble"),
    "recompute": ("recompute", True),
    "sequence_parallel": ("sequence_parallel", True),
    "keep": ("after", "keep"),
    "offload": ("after", "offload"),
    "free": ("after", "free"),
}
"""A word -> the key of a call in the plan file, and its value."""

OF_TRAINING = ("schedule", "recompute", "sequence_parallel")
"""Keys that mean something to train calls only."""


def flag_words(call: CallPlan) -> tuple[str, ...]:
    """The words for what is not the default of a call."""
    return tuple(
        word for word, (key, value) in FLAGS.items() if getattr(call, key) == value != getattr(CallPlan, key)
    )
