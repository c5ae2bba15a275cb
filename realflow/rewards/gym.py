"""`rewards.gym`: the scorers of reasoning-gym's own tasks (https://github.com/open-thought/reasoning-gym).

They run in worker processes with a limit of time. Some of them hand an answer to `eval`, or to a parser of
sympy that does; there these two are replaced, so that what a model wrote is read, and never executed.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

from realflow.graph.builtins import check_options
from realflow.graph.gymtasks import TASKS
from realflow.graph.schema import nearest
from realflow.rewards.countdown import tagged
from realflow.rewards.pool import Pool, Timeout, Value
from realflow.rewards.sandbox.inside.wire import Wire

_LONGEST = 20_000
_WORD = re.compile(r"[A-Za-z_]\w*")
_SYMBOLS = re.compile(r"[0-9A-Za-z_+\-*/^()., \n]*")
_ATTRIBUTE = re.compile(r"\.\s*[A-Za-z_]|[A-Za-z_)]\s*\.")
_FUNCTIONS = frozenset(
    ["sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log",
     "ln", "sqrt", "pi", "Abs", "abs"]
)  # fmt: skip
_LITERALS = (
    "algorithmic.string_insertion",
    "algorithmic.spiral_matrix",
    "algorithmic.binary_matrix",
    "algorithmic.number_sorting",
    "games.n_queens",
)


def gym(
    completion: Sequence[str],
    entry: Sequence[Any],
    *,
    task: str | None = None,
    seconds: float = 10.0,
    on_timeout: Literal["missing", "wrong", "error"] = "missing",
) -> dict[str, Any]:
    """The score that reasoning-gym gives each completion's answer to its row: from 0.0 to 1.0.

    The answer stands in the last `<answer>` tags, or is the whole completion. `entry` is the column of that
    name that the source `reasoning_gym` has; `task` names its task where the entry does not
    (`metadata.source_dataset`). An answer may be of a kind that a scorer raises on, or works on for longer
    than `seconds`: it then is missing (None), wrong (0.0), or an error, as `on_timeout` says.

    Returns `rewards` and, as `metrics`, how often each happened. Raises ValueError for a row that has no
    entry of a known task.
    """
    check_options("rewards.gym", seconds=seconds)
    items, wire = [], _wire()
    for text, row in zip(completion, entry, strict=True):
        answer = tagged(text)
        items.append((_task(row, task), (text if answer is None else answer).strip(), wire.encode(row)))
    rewards: list[float | None] = []
    count = {"timeout": 0, "error": 0}
    for index, result in enumerate(_pool(seconds).map(items)):
        if isinstance(result, Value):
            rewards.append(float(result.value))
            continue
        count["timeout" if isinstance(result, Timeout) else "error"] += 1
        rewards.append(0.0 if on_timeout == "wrong" else None)
        if on_timeout == "error":
            entry[index]  # whoever watches the column knows by this which sample it is about
            why = f"took over {seconds:g} s" if isinstance(result, Timeout) else result.message
            raise ValueError(f"the scorer of {items[index][0]} failed: {why}")
    total = max(1, len(items))
    return {"rewards": rewards, "metrics": {f"reward/gym/{what}": n / total for what, n in count.items()}}


def score(task: str, answer: str, entry: Any) -> float:
    """reasoning-gym's score of an answer. For a worker of the pool: it changes modules of reasoning-gym."""
    scorer = _scorer(task)
    return float(scorer(answer[:_LONGEST], _wire().decode(entry)))


@cache
def _scorer(task: str) -> Any:
    _harden()
    return importlib.import_module("reasoning_gym.factory").get_score_answer_fn(task)


@cache
def _harden() -> None:
    """Where scorers evaluate text, have them read literals and plain formulas alone."""
    for name in _LITERALS:
        vars(importlib.import_module(f"reasoning_gym.{name}"))["eval"] = ast.literal_eval
    sympy = importlib.import_module("sympy")
    parse = sympy.parse_expr

    def parse_formula(text: str, *args: Any, **options: Any) -> Any:
        check_formula(text)
        return parse(text, *args, **options)

    holders = [
        sympy,
        *(importlib.import_module(f"reasoning_gym.games.{n}") for n in ("puzzle24", "countdown")),
    ]
    for holder in holders:
        vars(holder)["parse_expr"] = parse_formula


def check_formula(text: str) -> None:
    """Raise ValueError for text that is more than numbers, one-letter symbols, operators and a few functions.
    Of other text sympy would make Python, and evaluate it."""
    words = set(_WORD.findall(text))
    known = all(len(word) == 1 or word in _FUNCTIONS for word in words)
    if not _SYMBOLS.fullmatch(text) or _ATTRIBUTE.search(text) or not known or "_" in words:
        raise ValueError("this is no plain formula")


def _task(row: Any, task: str | None) -> str:
    if not isinstance(row, Mapping) or "answer" not in row:
        raise ValueError(f"the entry is {row!r:.80}; expected one of reasoning-gym, with answer and metadata")
    name = task or row.get("metadata", {}).get("source_dataset")
    if not isinstance(name, str):
        raise ValueError("the entry does not say of which task it is (metadata.source_dataset); give `task`")
    if name not in TASKS:
        raise ValueError(f"reasoning-gym has no task {name!r}; {nearest(name, TASKS)}")
    return name


def _wire() -> Wire:
    """What carries an entry, with its tuples and the keys of its dicts, through JSON."""

    def unknown(number: int) -> Any:
        raise ValueError(f"the entry holds an object, {number}, that is no plain value")

    return Wire(None, None, unknown, lambda value: None)  # type: ignore[arg-type]


@cache
def _pool(seconds: float) -> Pool:
    return Pool("realflow.rewards.gym:score", workers=1, seconds=seconds)
