"""What a run costs beside its models, read from traces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from realflow.commands.bookkeeping import by_step, summary
from realflow.observe.trace import Span

DISPATCH, STEP, SAMPLE = 0.004, 0.03, 0.002
CALLS = {"rollout": 0.05, "ref": 0.01, "credit": 0.001, "train": 0.02}


def trace(samples: int, steps: int = 8) -> Iterator[Span]:
    """A run whose calls follow one another; its first steps are slow, and a reward is computed meanwhile."""
    now = 1000.0
    for step in range(steps):
        for call, seconds in CALLS.items():
            now += DISPATCH * (1 if step > 1 else 50)
            seconds += SAMPLE * samples * (call == "rollout")
            half = now + seconds / 2  # of several dispatches, or ranks
            yield Span(0, f"{call}@{step}", now, half)
            yield Span(1, f"{call}@{step}.1", half, now + seconds)
            yield Span(0, f"{call}@{step}", now - 1.0, now, kind="wait")
            yield Span(0, f"reward@{step}.0", now, now + 5.0)
            now += seconds
        yield Span(0, "save:actor", now, now + 0.001)
        now += STEP


def test_dispatch_step_and_sample() -> None:
    found = summary(by_step(trace(2)), by_step(trace(32)), 30)
    assert found == {
        "dispatch": pytest.approx(DISPATCH, rel=1e-6),
        "step": pytest.approx(STEP, rel=1e-6),
        "sample": pytest.approx(SAMPLE, rel=1e-6),
    }


def test_the_first_steps_are_left_out() -> None:
    assert len(by_step(trace(2))) == 6
    first = by_step(trace(2))[0]
    assert set(first) == set(CALLS) and first["rollout"].end - first["rollout"].start == pytest.approx(0.054)
