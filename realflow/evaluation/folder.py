"""The folder of an evaluation: what was asked, the answers that are there, and what is still missing.

evaluation.json  what the answers hang on; another evaluation is refused in the same folder
problems.jsonl   the problems: id, source, prompt, answer
samples.jsonl    a line for each answer, as they come; in order once all of them are there
runs/            the runs that drew them: sampled-1, greedy-1, and more where one was interrupted
results.json, results.md
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realflow.errors import InputError, Problem, RunError
from realflow.evaluation.graphs import differences
from realflow.evaluation.problems import PROBLEM_ID, PROBLEM_SOURCE, Problems
from realflow.evaluation.samples import Sample, from_line, from_record, to_line
from realflow.observe.files import AppendFile, json_line, read_lines, write_whole

SETTINGS, SAMPLES, PROBLEMS = "evaluation.json", "samples.jsonl", "problems.jsonl"
KINDS: Mapping[bool, str] = {False: "sampled", True: "greedy"}
"""Whether answers are greedy -> what their runs are called."""
_EVERY = 0.5
"""Seconds between two looks at what a run has recorded."""


class Folder:
    """An evaluation's folder. One process at a time writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._samples: dict[tuple[str, bool, int], Sample] = {}
        self._lock = threading.Lock()

    @property
    def samples(self) -> list[Sample]:
        """All answers that are there, in order."""
        return sorted(self._samples.values(), key=lambda sample: sample.order)

    def begin(self, settings: Mapping[str, Any], problems: Problems, *, samples: int, seed: int) -> None:
        """Make the folder, or go on with the one that is there; `samples` are drawn of each problem.

        Raises InputError where it holds something else, or answers that were drawn under other settings.
        """
        self._check(settings)
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / SETTINGS, json.dumps(settings, indent=1, default=str) + "\n")
        shown = (PROBLEM_ID, PROBLEM_SOURCE, "prompt", "answer")
        lines = [json_line({key: row[key] for key in shown if key in row}) for row in problems.rows]
        write_whole(self.path / PROBLEMS, b"".join(lines).decode("utf-8"))
        self._read()
        for greedy in KINDS:
            for run in self.runs(greedy):
                self._take(Tail(run / SAMPLES), samples=1 if greedy else samples, greedy=greedy, seed=seed)

    def _check(self, settings: Mapping[str, Any]) -> None:
        file = self.path / SETTINGS
        if not file.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                message = "is there already and holds no evaluation; choose another folder with -o"
                raise InputError(Problem(message, file=str(self.path)))
            return
        drawn = [self.path / SAMPLES, *(run / SAMPLES for kind in KINDS for run in self.runs(kind))]
        if not any(path.is_file() and path.stat().st_size for path in drawn):
            return
        plain = json.loads(json.dumps(settings, default=str))
        found = differences(read_settings(self.path), plain)
        if found:
            shown = "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")
            message = f"its answers were drawn otherwise: {shown}. Choose another folder with -o"
            raise InputError(Problem(message, file=str(self.path)))

    def _read(self) -> None:
        if (self.path / SAMPLES).is_file():
            for sample in read_samples(self.path):
                self._samples.setdefault(sample.key, sample)

    def runs(self, greedy: bool) -> list[Path]:
        """The runs that have drawn, oldest first."""
        found = (self.path / "runs").glob(f"{KINDS[greedy]}-*")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def next_run(self, greedy: bool) -> Path:
        """The folder of a run that is to come."""
        number = len(self.runs(greedy)) + 1
        while (path := self.path / "runs" / f"{KINDS[greedy]}-{number}").exists():
            number += 1
        return path

    def missing(self, problems: Problems, *, samples: int, greedy: bool) -> list[int]:
        """The places of problems that lack any of their answers."""
        numbers = range(1 if greedy else samples)
        return [
            place
            for place, name in enumerate(problems.ids)
            if any((name, greedy, number) not in self._samples for number in numbers)
        ]

    @contextmanager
    def following(self, run: Path, *, samples: int, greedy: bool, seed: int) -> Iterator[None]:
        """While a run draws: what it records is kept here too, line by line, and all of it in the end."""
        tail, over = Tail(run / SAMPLES), threading.Event()
        failed: list[RunError] = []

        def follow() -> None:
            try:
                while not over.wait(_EVERY):
                    self._take(tail, samples=samples, greedy=greedy, seed=seed)
            except RunError as error:  # the disk is full: the run will say so too
                failed.append(error)

        thread = threading.Thread(target=follow, name="follow", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._take(tail, samples=samples, greedy=greedy, seed=seed)
        if failed:
            raise failed[0]

    def _take(self, tail: Tail, *, samples: int, greedy: bool, seed: int) -> None:
        """Keep what a run has recorded since the last time."""
        self._add(from_record(row, samples=samples, greedy=greedy, seed=seed) for row in tail.new())

    def _add(self, samples: Iterable[Sample]) -> None:
        with self._lock:
            new = {sample.key: sample for sample in samples if sample.key not in self._samples}
            if new:
                file = AppendFile(self.path / SAMPLES, lines=True)
                try:
                    file.write(b"".join(json_line(to_line(sample)) for sample in new.values()))
                finally:
                    file.close()
                self._samples |= new

    def finish(self, results: Mapping[str, Any], page: str) -> None:
        """All answers are there: put them in order, and write the results."""
        lines = b"".join(json_line(to_line(sample)) for sample in self.samples)
        write_whole(self.path / SAMPLES, lines.decode("utf-8"))
        write_whole(self.path / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        write_whole(self.path / "results.md", page)


class Tail:
    """The whole lines that a growing file has got since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def new(self) -> list[dict[str, Any]]:
        """Their objects; [] where the file is not there yet. A line that is cut off waits for its end."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            found = file.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._at += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def read_settings(path: Path) -> dict[str, Any]:
    """What an evaluation was asked for. Raises InputError where the folder has none."""
    file = path / SETTINGS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        message = f"expected the folder of an evaluation, with its {SETTINGS} and {SAMPLES}"
        raise InputError(Problem(message, file=str(path))) from None
    except ValueError as error:
        raise InputError(Problem(f"not JSON: {error}", file=str(file))) from None
    if not isinstance(found, dict):
        raise InputError(Problem("expected a JSON object", file=str(file)))
    return found


def read_samples(path: Path) -> Sequence[Sample]:
    """The answers of an evaluation. Raises InputError where the folder has none, or a line that is none."""
    file = path / SAMPLES
    if not file.is_file():
        message = f"there is no {SAMPLES} here; expected the folder of an evaluation"
        raise InputError(Problem(message, file=str(path)))
    return [from_line(row, where=str(file)) for row in read_lines(file)]


def changed_problems(ours: Path, theirs: Path) -> int:
    """How many problems of two evaluations have one id, but not the same prompt and answer."""
    mine, other = _texts(ours), _texts(theirs)
    return sum(other[name] != row for name, row in mine.items() if name in other)


def _texts(path: Path) -> dict[str, dict[str, Any]]:
    file = path / PROBLEMS
    if not file.is_file():
        return {}
    return {str(row.get(PROBLEM_ID)): row for row in read_lines(file)}
