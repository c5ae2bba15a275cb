"""`rewards.code`: programs, by the tests that they pass in a sandbox."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from realflow.graph.builtins import check_options
from realflow.rewards.sandbox import Limits, SandboxError, Verdict, run_tests
from realflow.rewards.sandbox.ability import required

_FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})\s*(\w*)[^`]*")
_PYTHON = ("python", "py", "python3")


def code(
    completion: Sequence[str],
    tests: Sequence[Any],
    *,
    partial: bool = False,
    seconds: float = 10.0,
    megabytes: int = 1024,
    tolerance: float = 1e-6,
    workers: int = 0,
) -> dict[str, Any]:
    """1.0 where the program in a completion passes all of its tests, else 0.0; with `partial` the share.

    The program is the last Python block of the completion (see `program_in`). Tests are Python code with
    asserts (one test), a list of such (a test each), pairs of what it reads and prints
    (`{"inputs": [..], "outputs": [..]}`), or with `fn_name` the arguments and results of a function; or
    JSON text of these. Decimal numbers may differ by `tolerance`. One run takes at most `seconds` and
    `megabytes`; `workers` programs run at once (0: as many as this process has cores).

    Returns `rewards` and, as `metrics`, the shares of samples without a program, ended by their limit of
    time, and ended by another limit. Raises InputError where this machine cannot contain programs,
    ValueError for tests that cannot be read, SandboxError where the sandbox itself fails.
    """
    check_options("rewards.code", seconds=seconds, tolerance=tolerance)
    limits = Limits(seconds=seconds, memory=megabytes << 20)
    walls = required()

    def examined(index: int) -> Verdict | None:
        text, wanted = rows[index]
        program = program_in(text)
        if program is None:
            return None
        return patient(
            lambda: run_tests(program, wanted, limits, partial=partial, tolerance=tolerance, walls=walls)
        )

    rows = list(zip(completion, tests, strict=True))
    verdicts = all_examined(examined, completion, workers)
    share = [0.0 if verdict is None else verdict.passed / verdict.total for verdict in verdicts]
    return {
        "rewards": share if partial else [float(value == 1.0) for value in share],
        "metrics": ends("code", verdicts),
    }


def program_in(text: str) -> str | None:
    """The last block that is fenced as Python, or else the last that is fenced without a language; None where
    there is none. A block that is not closed goes to the end of the text. One pass over the lines."""
    found: dict[bool, list[str]] = {}
    block: list[str] | None = None
    fence = ""
    for line in text.splitlines():
        match = _FENCE.fullmatch(line) if line.lstrip()[:3] in ("```", "~~~") else None
        if block is not None:
            if match and match[1].startswith(fence) and not match[2]:
                block = None
            else:
                block.append(line)
        elif match:
            fence, block = match[1], []
            language = match[2].lower()
            if language in _PYTHON or not language:
                found[language in _PYTHON] = block
    lines = found.get(True) or found.get(False)
    return "\n".join(lines) + "\n" if lines else None


def all_examined(
    examine: Callable[[int], Verdict | None], samples: Sequence[Any], workers: int
) -> list[Verdict | None]:
    """`examine(i)` for each of the samples, `workers` at once. Raises what the first failing one raised."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        waiting = [pool.submit(examine, index) for index in range(len(samples))]
        verdicts: list[Verdict | None] = []
        try:
            for index, future in enumerate(waiting):
                samples[index]  # whoever watches the column knows by this which one it is about
                verdicts.append(future.result())
        finally:
            for future in waiting:
                future.cancel()
    return verdicts


def patient(run: Callable[[], Verdict]) -> Verdict:
    """`run()`, once more where the sandbox failed: a machine may be short of processes for a moment."""
    try:
        return run()
    except SandboxError:
        return run()


def ends(name: str, verdicts: Sequence[Verdict | None]) -> dict[str, float]:
    """How programs ended, as metrics: shares of all samples."""
    count = Counter("no_program" if verdict is None else verdict.reason for verdict in verdicts)
    total = max(1, len(verdicts))
    limits = sum(
        number for reason, number in count.items() if reason not in ("exit", "no_program", "seconds")
    )
    return {
        f"reward/{name}/no_program": count["no_program"] / total,
        f"reward/{name}/timeout": count["seconds"] / total,
        f"reward/{name}/limit": limits / total,
    }
