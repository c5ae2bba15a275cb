"""What becomes of prompts and pairs that are longer than `max_length`.

`error` stops the run, `truncate` cuts (of a prompt the beginning, so that it still ends where the answer
begins; of a pair the end), `drop` leaves the row out and gives its place to another one. Which one is a
function of the place alone, so nothing has to be counted before and a run resumes from its cursor: each row
that is short enough comes once in an epoch as it would without the others, and the places of those that are
too long are filled with rows that then come a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from realflow.data.source import Prompts
from realflow.errors import InputError, Problem
from realflow.graph.types import DataSpec

MOST_PROBES = 256
"""So many rows are tried for a place. Where 9 of 10 are too long, one place in 500 billion finds none."""


class FittingPrompts:
    """Prompts of a source without the rows that are too long (`fits` says which)."""

    def __init__(self, source: Prompts, fits: Callable[[Mapping[str, Any]], bool], limit: int) -> None:
        self._source, self._fits, self._limit = source, fits, limit
        self.dropped = lru_cache(maxsize=1 << 16)(self._dropped)

    def __len__(self) -> int:
        return len(self._source)

    def row(self, g: int, again: int = 0) -> dict[str, Any]:
        """The fields of prompt `g` (see `realflow.data.source.Prompts`)."""
        assert again == 0, "what stands in for a row is chosen here"
        return self._source.row(g, self.dropped(g))

    def _dropped(self, g: int) -> int:
        """How many rows were too long before one was found for prompt `g`.

        Raises InputError where `MOST_PROBES` were too long.
        """
        for again in range(MOST_PROBES):
            if self._fits(self._source.row(g, again)):
                return again
        raise InputError(
            Problem(
                f"{MOST_PROBES} rows were tried for prompt {g}, and all have more than {self._limit} tokens; "
                "raise max_length, or leave such rows out of the data",
                where="data.over",
            )
        )


def limit_prompt(tokens: Sequence[int], spec: DataSpec, group: int) -> tuple[int, ...]:
    """The tokens of the prompt of `group`, within the limit of the data: with `over: truncate` its last ones.

    Raises InputError for a longer one otherwise.
    """
    limit = spec.prompt_tokens
    if len(tokens) <= limit:
        return tuple(tokens)
    if spec.over == "truncate":
        return tuple(tokens[-limit:])
    raise InputError(
        Problem(
            f"the prompt of group {group} has {len(tokens)} tokens, more than {limit}"
            f"{' (the default)' if spec.max_length is None else ''}; set max_length to at least "
            f"{len(tokens)}, or say with 'over' whether such prompts are dropped or truncated",
            where="data.max_length",
        )
    )


def counted(flags: Sequence[bool]) -> list[float]:
    """How many of how many, as a metric's [sum, count, min, max]."""
    return [float(sum(flags)), float(len(flags)), float(min(flags)), float(max(flags))]
