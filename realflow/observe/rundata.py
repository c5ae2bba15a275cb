"""What a run's directory holds, read for people: a missing or broken file is said, never fatal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realflow.errors import InputError
from realflow.observe.files import read_lines
from realflow.observe.metrics import METRICS, RESERVED, SAMPLES, read_metrics
from realflow.observe.trace import Span, read_spans, split_name
from realflow.planfile import Plan, read_plan

FILES = ("graph.yaml", "plan.yaml", METRICS, SAMPLES, "trace.json", "checkpoints")
ERROR = "error.txt"
_KEPT_ROWS = 512


@dataclass
class StepSamples:
    """The samples of one step: all are counted, the first `_KEPT_ROWS` kept."""

    step: int
    rows: dict[Any, dict[str, Any]] = field(default_factory=dict)
    rewards: dict[Any, float | None] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Samples of the step."""
        return len(self.rewards)

    @property
    def mean_reward(self) -> float | None:
        """Mean over the samples that have a reward."""
        known = [reward for reward in self.rewards.values() if reward is not None]
        return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class RunData:
    """A run as far as its directory tells. `troubles` says what is missing or unreadable."""

    run_dir: Path
    plan: Plan | None
    graph_text: str | None
    metrics: tuple[Mapping[str, Any], ...]
    samples: tuple[StepSamples, ...]
    spans: tuple[Span, ...]
    checkpoints: tuple[tuple[str, int], ...]
    troubles: tuple[str, ...]
    error: str | None = None
    """Why the run failed, as its master wrote it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all metrics, in order of first appearance."""
        return tuple(dict.fromkeys(name for row in self.metrics for name in row if name not in RESERVED))

    def series(self, name: str) -> list[tuple[int, float | None]]:
        """(step, value) of one metric; None where the step has no finite value."""
        return [(row["step"], _number(row.get(name))) for row in self.metrics]

    def values(self, name: str) -> list[float]:
        """The finite values of one metric in order of step."""
        return [value for _, value in self.series(name) if value is not None]

    def values_of_time(self) -> list[float]:
        """When each step ended, in seconds since 1970."""
        return [value for _, value in self.series("time") if value is not None]

    @property
    def steps_planned(self) -> int | None:
        """Steps that the graph asks for."""
        return self.plan.graph.steps if self.plan else None

    @property
    def steps_done(self) -> int:
        """Steps finished, those before a restart included."""
        return self.metrics[-1]["step"] + 1 if self.metrics else 0


def load_run(run_dir: Path | str) -> RunData:
    """Read a run's directory. Raises InputError where there is no directory, or none of a run."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such directory; expected the directory of a run, such as runs/grpo")
    if not any((run_dir / name).exists() for name in (*FILES, ERROR)):
        raise InputError(f"{run_dir}: not a run's directory; expected at least one of {', '.join(FILES)}")
    troubles = [f"{name} is missing." for name in FILES if not (run_dir / name).exists()]
    return RunData(
        run_dir=run_dir,
        plan=_plan(run_dir / "plan.yaml", troubles),
        graph_text=_text(run_dir / "graph.yaml"),
        metrics=tuple(read_metrics(run_dir)),
        samples=_samples(run_dir / SAMPLES),
        spans=_spans(run_dir / "trace.json", troubles),
        checkpoints=_checkpoints(run_dir / "checkpoints"),
        troubles=tuple(troubles),
        error=_text(run_dir / ERROR),
    )


def _text(path: Path) -> str | None:
    return path.read_text("utf-8", errors="replace") if path.is_file() else None


def _plan(path: Path, troubles: list[str]) -> Plan | None:
    if not path.is_file():
        return None
    try:
        return read_plan(path)
    except InputError as error:
        troubles.append(f"plan.yaml cannot be read: {error}")
        return None


def _spans(path: Path, troubles: list[str]) -> tuple[Span, ...]:
    if not path.is_file():
        return ()
    try:
        return read_spans(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        troubles.append(f"trace.json cannot be read: {type(error).__name__}: {error}")
        return ()


def _samples(path: Path) -> tuple[StepSamples, ...]:
    """The first two and the last two steps; the file is read as a stream, as it can be large."""
    if not path.is_file():
        return ()
    kept: dict[int, StepSamples] = {}
    for row in read_lines(path):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        if step not in kept and len(kept) == 4:
            low = sorted(kept)
            if low[1] < step < low[2]:
                continue
            del kept[low[2] if step > low[2] else low[1]]
        held = kept.setdefault(step, StepSamples(step))
        key = row.get("sample_id", len(held.rewards))
        held.rewards[key] = _number(row.get("rewards"))
        if key in held.rows or len(held.rows) < _KEPT_ROWS:
            held.rows[key] = row
    return tuple(kept[step] for step in sorted(kept))


def _checkpoints(folder: Path) -> tuple[tuple[str, int], ...]:
    """(name, bytes) of each checkpoint that is in place."""
    if not folder.is_dir():
        return ()
    found = sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name.startswith("step-"))
    return tuple((entry.name, _size(entry.rglob("*"))) for entry in found)


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def spans_of_step(spans: Iterable[Span], step: int) -> tuple[Span, ...]:
    """The spans whose dispatch (or argument `step`) belongs to a step."""
    return tuple(span for span in spans if step_of(span) == step)


def step_of(span: Span) -> int | None:
    """The step that a span belongs to, or None."""
    _, step = split_name(span.name)
    given = span.args.get("step")
    return step if step is not None else given if isinstance(given, int) else None
