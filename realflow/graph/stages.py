"""`max_new_tokens` of a generate call: one limit, or stages of a run with a limit each.

max_new_tokens: 1024
max_new_tokens: [[100, 1024], [200, 4096], [null, 8192]]  # to step 100, from there to step 200, from there on
"""

from __future__ import annotations

from typing import Any

from realflow.graph.schema import Kind, Wrong, read_element, shown, whole
from realflow.graph.types import Stage

_TOKENS = whole(1)


def _read_limits(value: Any) -> tuple[Stage, ...]:
    """A single limit is one stage, which never ends."""
    if not isinstance(value, list | tuple):
        return ((None, _TOKENS.read(value)),)
    if not value:
        raise Wrong("the list is empty")
    stages = tuple(read_element(_STAGE, value, index) for index in range(len(value)))
    ends = [end for end, _ in stages[:-1]]
    if stages[-1][0] is not None:
        raise Wrong("the last stage must be [null, tokens]: it lasts to the end of the run")
    before = 0
    for index, end in enumerate(ends):
        if end is None:
            raise Wrong(f"element {index + 1} never ends; only the last stage has null")
        if end <= before:
            raise Wrong(f"element {index + 1} ends at step {end}, expected more than {before}: stages rise")
        before = end
    return stages


def _read_stage(value: Any) -> Stage:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Wrong(f"{shown(value)} is no pair")
    end, limit = value
    return (None if end is None else whole(1).read(end)), _TOKENS.read(limit)


_STAGE = Kind("[step, tokens]", _read_stage)

LIMITS: Kind[tuple[Stage, ...]] = Kind(
    "a whole number >= 1, or stages [[step, tokens], ..., [null, tokens]] whose steps rise", _read_limits
)


def plain_limits(stages: tuple[Stage, ...]) -> int | list[list[int | None]]:
    """Stages as `LIMITS` reads them."""
    return stages[0][1] if len(stages) == 1 else [list(stage) for stage in stages]
