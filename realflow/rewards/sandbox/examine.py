"""Running a program's tests: the program behind one wall, the tests behind another, the verdict out here."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from realflow.rewards.sandbox.ability import required
from realflow.rewards.sandbox.forms import Asserts, Calls, Dialogues, read_tests
from realflow.rewards.sandbox.inside.compare import same_text
from realflow.rewards.sandbox.limits import Limits
from realflow.rewards.sandbox.process import Contained, Ended, SandboxError, Walls

TOLERANCE = 1e-6
_MORE_SECONDS = (
    2.0  # of a tester, beyond those of the program: the program's limit is to be the one that ends it
)


class BrokenTests(ValueError):
    """The tests themselves cannot be read, so that nothing is said of the program."""


@dataclass(frozen=True)
class Verdict:
    """What came of a program: `passed` of `total` tests. `reason` is how it ended (see `Ended`), or `tester`
    where the process that tested it died; `note` is what was wrong with the first test that it failed."""

    passed: int
    total: int
    reason: str = "exit"
    note: str = ""

    @property
    def all_passed(self) -> bool:
        """Whether every test holds."""
        return self.passed == self.total


def run_program(
    program: str, stdin: str = "", limits: Limits | None = None, *, walls: Walls | None = None
) -> Ended:
    """Run a Python program on an input. Raises InputError where this machine cannot contain it, and
    SandboxError where the sandbox itself fails; whatever the program does is in what is returned."""
    with tempfile.TemporaryFile() as file:
        file.write(stdin.encode("utf-8", "surrogatepass"))
        file.seek(0)
        with Contained(
            walls or required(), limits or Limits(), ["program.py"], {"program.py": program},
            stdin=file.fileno(), quiet=False,
        ) as process:  # fmt: skip
            return process.wait()


def run_tests(
    program: str,
    tests: Any,
    limits: Limits | None = None,
    *,
    partial: bool = True,
    tolerance: float = TOLERANCE,
    walls: Walls | None = None,
) -> Verdict:
    """Test a program. `tests` are in one of the forms that `read_tests` knows; without `partial` the first
    failure ends a test of several runs. `limits` are those of one run: one for each input, or one for all
    asserts and calls.

    What the program should print or return never comes where the program is: outputs are compared here, and
    asserts run in a process behind a wall of its own, which asks the program's for values and objects.

    Raises BrokenTests, InputError (no sandbox on this machine) and SandboxError.
    """
    walls, limits = walls or required(), limits or Limits()
    try:
        read = read_tests(tests)
    except ValueError as error:
        raise BrokenTests(str(error)) from None
    if isinstance(read, Dialogues):
        return _talk(program, read, limits, walls, partial, tolerance)
    return _ask(program, read, limits, walls, tolerance)


def _talk(
    program: str, tests: Dialogues, limits: Limits, walls: Walls, partial: bool, tolerance: float
) -> Verdict:
    """Run the program on each input."""
    verdict = Verdict(0, len(tests.pairs))
    for given, expected in tests.pairs:
        ended = run_program(program, given, limits, walls=walls)
        problem = _problem(ended, expected, tolerance)
        if not problem:
            verdict = replace(verdict, passed=verdict.passed + 1)
            continue
        if not verdict.note:
            verdict = replace(verdict, reason=ended.reason, note=problem)
        if not partial:
            break
    return verdict


def _problem(ended: Ended, expected: str, tolerance: float) -> str:
    if ended.reason != "exit":
        return f"it was ended by its limit of {ended.reason}"
    if ended.status != 0:
        last = ended.errors.decode(errors="replace").strip().splitlines()[-1:]
        return f"it ended with status {ended.status}{': ' + last[0][:300] if last else ''}"
    found = ended.output.decode(errors="replace")
    return (
        "" if same_text(found, expected, tolerance) else f"it printed {found!r:.100}, not {expected!r:.100}"
    )


def _ask(program: str, tests: Asserts | Calls, limits: Limits, walls: Walls, tolerance: float) -> Verdict:
    """Run the program and its tester side by side, with a pipe each way between them."""
    to_program, from_tester = os.pipe()
    to_tester, from_program = os.pipe()
    out, verdict_pipe = os.pipe()
    theirs = [to_program, from_tester, to_tester, from_program, verdict_pipe]
    with os.fdopen(out, "rb") as verdicts:
        try:
            with Contained(
                walls, limits,
                ["-P", "-m", "inside.candidate", "program.py", str(to_program), str(from_program)],
                {"program.py": program}, keep=(to_program, from_program), harness=True,
            ) as candidate:  # fmt: skip
                longer = replace(limits, seconds=limits.seconds + _MORE_SECONDS)
                ends = [str(number) for number in (to_tester, from_tester, verdict_pipe)]
                with Contained(
                    walls, longer, ["-P", "-m", "inside.tester", "tests.json", *ends],
                    {"tests.json": json.dumps(_written(tests, tolerance))},
                    keep=(to_tester, from_tester, verdict_pipe), harness=True,
                ) as tester:  # fmt: skip
                    _close(theirs)
                    lines = _lines(verdicts, limits.output)
                    tested = tester.wait()
                candidate.stop()
                ended = candidate.wait()
        finally:
            _close(theirs)
    total = len(tests.units) if isinstance(tests, Asserts) else len(tests.cases)
    return _verdict(lines, total, ended, tested)


def _written(tests: Asserts | Calls, tolerance: float) -> dict[str, Any]:
    if isinstance(tests, Asserts):
        return {"setup": tests.setup, "units": tests.units, "entry": tests.entry}
    return {"function": tests.function, "cases": tests.cases, "tolerance": tolerance}


def _lines(verdicts: BinaryIO, most: int) -> list[Mapping[str, Any]]:
    """What the tester said, until it ended. Raises SandboxError for anything that is not a verdict."""
    text = verdicts.read(most)
    try:
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
    except ValueError as error:
        raise SandboxError(f"the tester wrote what is no verdict: {error}") from error


def _verdict(lines: list[Mapping[str, Any]], total: int, ended: Ended, tested: Ended) -> Verdict:
    broken = [line["broken"] for line in lines if "broken" in line]
    if broken:
        raise BrokenTests(f"the tests cannot be read: {broken[0]}")
    passed = sum(line.get("passed") is True for line in lines)
    notes = [str(line.get("note", "")) for line in lines if line.get("passed") is not True]
    reason = ended.reason if ended.reason not in ("exit", "stopped") else tested.reason
    if reason != "exit":
        notes.insert(0, f"it was ended by its limit of {reason}")
    elif len(lines) < total:
        reason = "tester"
        notes.append(f"the tester ended with status {tested.status} after {len(lines)} of {total} tests")
    return Verdict(passed, total, reason, notes[0] if passed < total and notes else "")


def _close(numbers: list[int]) -> None:
    while numbers:
        os.close(numbers.pop())
