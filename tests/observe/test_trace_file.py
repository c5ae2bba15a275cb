"""Spans: their sums against a counted grid, and the trace file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.observe.trace import (
    Span,
    Trace,
    busy_by_rank,
    idle_fraction,
    read_spans,
    split_name,
    to_events,
)

TICKS = 40
SPANS = st.lists(
    st.builds(
        lambda rank, start, length, kind: Span(rank, "x@0", start, start + length, kind),
        st.integers(0, 3),
        st.integers(-5, TICKS),
        st.integers(0, 15),
        st.sampled_from(["compute", "compute", "move"]),
    ),
    max_size=20,
)


def computes(spans, tick):
    """Whether a span computes in [tick, tick + 1): the slow, plain definition."""
    return any(s.kind == "compute" and s.start <= tick and tick + 1 <= s.end for s in spans)


@given(SPANS)
def test_idle_fraction_is_the_share_of_ticks_without_compute(spans):
    idle = sum(not computes(spans, tick) for tick in range(TICKS))
    assert idle_fraction(spans, 0, TICKS) == pytest.approx(idle / TICKS, abs=1e-9)


@given(SPANS)
def test_busy_seconds_of_each_rank(spans):
    busy = busy_by_rank(spans, 0, TICKS)
    assert set(busy) == {span.rank for span in spans}
    for rank, seconds in busy.items():
        own = [span for span in spans if span.rank == rank]
        assert seconds == pytest.approx(sum(computes(own, tick) for tick in range(TICKS)), abs=1e-9)


def test_nothing_is_idle_in_no_time():
    assert idle_fraction([], 3.0, 3.0) == 0.0
    assert idle_fraction([], 0.0, 1.0) == 1.0


@given(SPANS)
def test_events_of_one_thread_never_overlap(spans):
    ends: dict[tuple[int, int], float] = {}
    for event in sorted(
        (e for e in to_events(spans)["traceEvents"] if e["ph"] == "X"), key=lambda e: e["ts"]
    ):
        place = (event["pid"], event["tid"])
        assert event["ts"] >= ends.get(place, 0.0)
        ends[place] = event["ts"] + event["dur"]


def test_a_written_trace_comes_back(tmp_path):
    trace = Trace()
    trace.span(1, "train@3", 1_700_000_000.5, 1_700_000_002.75, tokens=12)
    trace.span(0, "rollout@3", 1_700_000_000.0, 1_700_000_000.5)
    trace.span(0, "samples", 1_700_000_000.1, 1_700_000_000.2, kind="move")
    trace.write(tmp_path / "trace.json")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    document = json.loads((tmp_path / "trace.json").read_text())
    names = {e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"}
    assert names == {"rank 0", "rank 1"}
    train = next(e for e in document["traceEvents"] if e["name"] == "train@3")
    assert (train["ts"], train["dur"], train["args"]) == (500_000.0, 2_250_000.0, {"tokens": 12})
    back = sorted(read_spans(tmp_path / "trace.json"), key=lambda span: span.start)
    assert [(s.rank, s.name, s.kind) for s in back] == [
        (0, "rollout@3", "compute"),
        (0, "samples", "move"),
        (1, "train@3", "compute"),
    ]
    assert back[2].end == pytest.approx(1_700_000_002.75, abs=1e-6)


def test_old_spans_go_and_are_counted():
    trace = Trace(limit=2)
    for step in range(5):
        trace.span(0, f"train@{step}", step, step - 1)
    assert [span.name for span in trace.spans] == ["train@3", "train@4"]
    assert all(span.end == span.start for span in trace.spans)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rollout@17", ("rollout", 17)),
        ("reward@17.0", ("reward", 17)),
        ("start", ("start", None)),
        ("a@b", ("a@b", None)),
    ],
)
def test_split_name(name, expected):
    assert split_name(name) == expected


def test_another_json_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="no trace"):
        read_spans(tmp_path / "x.json")
