"""`rewards.humaneval`: completions of HumanEval's prompts (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from realflow.graph.builtins import check_options
from realflow.rewards.code import all_examined, ends, patient, program_in
from realflow.rewards.sandbox import Limits, Verdict, run_tests
from realflow.rewards.sandbox.ability import required
from realflow.rewards.sandbox.forms import Asserts

_STOP = re.compile(r"\n(?:class|def|if|print|assert|#|@|```)")


def humaneval(
    completion: Sequence[str],
    prompt: Sequence[Any],
    test: Sequence[str],
    entry_point: Sequence[str],
    *,
    seconds: float = 10.0,
    megabytes: int = 1024,
    workers: int = 0,
) -> dict[str, Any]:
    """1.0 where the function that a completion gives passes `check` of the row's `test`, else 0.0.

    `prompt`, `test` and `entry_point` are columns of HumanEval. A completion goes on where the prompt ends,
    up to the next top-level statement (the paper's stop words), or has a fenced block with the function.

    Returns `rewards` and `metrics` as `rewards.code` does, and raises as it does.
    """
    check_options("rewards.humaneval", seconds=seconds)
    limits = Limits(seconds=seconds, memory=megabytes << 20)
    walls = required()
    rows = list(zip(completion, prompt, test, entry_point, strict=True))

    def examined(index: int) -> Verdict:
        text, start, tests, entry = rows[index]
        if not isinstance(start, str) or not entry.isidentifier():
            raise ValueError(
                f"the prompt is {type(start).__name__} and the entry point {entry!r}; expected HumanEval's "
                "columns: text, and the name of a function"
            )
        written = Asserts((f"check({entry})",), f"{helpers(start)}\n{tests}", entry)
        program = whole_program(text, start)
        return patient(lambda: run_tests(program, written, limits, walls=walls))

    verdicts = all_examined(examined, completion, workers)
    passed = [float(verdict is not None and verdict.all_passed) for verdict in verdicts]
    return {"rewards": passed, "metrics": ends("humaneval", verdicts)}


def whole_program(completion: str, prompt: str) -> str:
    """The program of a completion: the prompt, and its continuation or the block that it fences."""
    block = program_in(completion)
    if block is not None:
        return f"{prompt}\n{block}"
    return prompt + _STOP.split(completion, maxsplit=1)[0]


def helpers(prompt: str) -> str:
    """The prompt, if it is a program by itself: tests may use functions that it defines, and shall have these
    from it and not from the completion."""
    try:
        ast.parse(prompt)
    except (SyntaxError, ValueError):
        return ""
    return prompt
