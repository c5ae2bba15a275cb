"""`rewards.format`: whether a completion has the form that was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from realflow.errors import InputError
from realflow.graph.builtins import check_options
from realflow.rewards.pool import Pool, Timeout, Value

TAGS = ("think", "answer")


def format(
    completion: Sequence[str],
    *,
    tags: Any = None,
    pattern: str | None = None,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """1.0 where a completion has the form, else 0.0.

    With `tags` (`[think, answer]` where nothing else is said) the text is `<think>..</think>` and then
    `<answer>..</answer>`, each tag once, with nothing but white space between and around them. Or give a
    `pattern`: a regular expression (of Python's `re`, where `.` is any character) that the whole text
    matches. One can take longer than anyone waits: it is tried in another process, for at most `seconds` a
    text.

    Returns `rewards` (None for a text on which the pattern ran out of time) and, as `metrics`, how often that
    happened. Raises InputError for options that are not as said.
    """
    check_options("rewards.format", seconds=seconds)
    if tags is not None and pattern is not None:
        raise InputError("rewards.format: give either tags or a pattern")
    if pattern is None:
        names = _names(TAGS if tags is None else tags)
        return {"rewards": [float(in_tags(text, names)) for text in completion], "metrics": {}}
    try:
        re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise InputError(f"rewards.format: the pattern {pattern!r} cannot be read: {error}") from None
    rewards: list[float | None] = []
    for result in _pool(seconds).map([(pattern, text) for text in completion]):
        if isinstance(result, Value):
            rewards.append(float(result.value))
        elif isinstance(result, Timeout):
            rewards.append(None)
        else:
            raise ValueError(f"the pattern {pattern!r} failed: {result.message}")
    late = sum(reward is None for reward in rewards) / max(1, len(rewards))
    return {"rewards": rewards, "metrics": {"reward/format/timeout": late, "reward/format/missing": late}}


def in_tags(text: str, tags: Sequence[str]) -> bool:
    """Whether a text is these tags, one after the other, each once. Linear in its length."""
    rest = text.strip()
    for tag in tags:
        first, last = f"<{tag}>", f"</{tag}>"
        if not rest.startswith(first) or text.count(first) != 1 or text.count(last) != 1:
            return False
        end = rest.find(last)
        if end < 0:
            return False
        rest = rest[end + len(last) :].lstrip()
    return not rest


def matches(pattern: str, text: str) -> bool:
    """Whether the whole text matches. For a worker of the pool."""
    return re.fullmatch(pattern, text, re.DOTALL) is not None


@cache
def _pool(seconds: float) -> Pool:
    return Pool("realflow.rewards.format:matches", workers=1, seconds=seconds)


def _names(tags: Any) -> list[str]:
    good = isinstance(tags, list | tuple) and tags and all(isinstance(tag, str) and tag for tag in tags)
    if not good or len(set(tags)) != len(tags):
        raise InputError(f"rewards.format: tags is {tags!r}; expected a list of different names")
    return list(tags)
