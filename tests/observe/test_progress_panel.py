"""Progress: plain lines, the live panel, and the time left."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from realflow.observe.progress import Progress, duration, sparkline


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def feed(progress, clock, steps, seconds=10.0):
    for step in range(steps):
        progress.update({"kind": "running", "call": f"rollout@{step}", "step": step, "done": 40, "of": 64})
        clock.now += seconds
        metrics = {"critic/rewards/mean": step / 10}
        progress.update({"kind": "step", "step": step, "seconds": seconds, "metrics": metrics})


def test_a_stream_that_is_no_terminal_gets_one_line_a_step():
    stream, clock = io.StringIO(), Clock()
    with Progress(8, stream=stream, clock=clock) as progress:
        feed(progress, clock, 7)
        progress.update({"kind": "note", "text": "[saved] step-000007"})
        progress.update({"kind": "end", "text": "done"})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 9
    assert lines[6] == "step 6  (7/8)  reward 0.600  last 5: 0.400  10.0 s  left 10 s"
    assert lines[7:] == ["[saved] step-000007", "done"]


def test_steps_without_reward_or_with_nan():
    stream = io.StringIO()
    with Progress(2, stream=stream) as progress:
        progress.update({"kind": "step", "step": 0, "seconds": 1.0, "metrics": {}})
        progress.update({"kind": "step", "step": 1, "seconds": 1.0, "metrics": {"critic/rewards/mean": None}})
    assert "reward" not in stream.getvalue()


def test_the_panel_shows_reward_calls_and_time_left():
    clock = Clock()
    with Progress(45, title="grpo", stream=io.StringIO(), clock=clock) as progress:
        feed(progress, clock, 4, seconds=12.0)
        progress.update({"kind": "running", "call": "rollout@4", "step": 4, "done": 40, "of": 64})
        progress.update({"kind": "running", "call": "reward@4.1", "step": 4})
        progress.update({"kind": "running", "call": "ref@4", "step": 4, "done": 64, "of": 64})
        clock.now += 2.0
        console = Console(width=110, file=io.StringIO(), record=True)
        console.print(progress._panel())
    text = console.export_text()
    for expected in (
        "grpo",
        "4/45 steps",
        "50 s gone",
        "8 min 10 s left",
        "0.300",
        "rollout 40/64",
        "reward",
    ):
        assert expected in text, text
    assert "ref" not in text  # all of its samples are done


def test_a_terminal_gets_a_live_panel_and_is_restored():
    stream, clock = Terminal(), Clock()
    with Progress(3, stream=stream, clock=clock) as progress:
        feed(progress, clock, 3)
        progress.close()
    text = stream.getvalue()
    assert "3/3 steps" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor is shown again


def test_time_left_never_goes_below_zero_and_slow_steps_count_from_their_begin():
    clock = Clock()
    progress = Progress(3, stream=io.StringIO(), clock=clock)
    assert progress.seconds_left() is None
    feed(progress, clock, 1)
    assert progress.seconds_left() == 20
    clock.now += 4
    assert progress.seconds_left() == 16
    clock.now += 100
    assert progress.seconds_left() == 10


def test_an_error_is_said_whole():
    stream = io.StringIO()
    with Progress(1, stream=stream) as progress:
        progress.update({"kind": "error", "text": "rank 1 died in train@2:\n  [killed] " + "x" * 200})
    assert stream.getvalue() == "rank 1 died in train@2:\n  [killed] " + "x" * 200 + "\n"


def test_an_unknown_event_is_refused():
    with Progress(1, stream=io.StringIO()) as progress, pytest.raises(ValueError, match="oops"):
        progress.update({"kind": "oops"})


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 50))
def test_sparkline_fits(values, width):
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
