"""Predicted against measured: in metrics, in the report, in the terminal."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import pytest
from synthetic_run import SECONDS, make_plan, whole_run

from realflow.observe.collect import Collector
from realflow.observe.predicted import lengths_compared, lines, predictions, seconds_compared
from realflow.observe.progress import Progress
from realflow.observe.report import render
from realflow.planfile.types import LENGTHS
from realflow.runtime.messages import DispatchDone

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from scenes import grpo


def planned():
    plan = make_plan()
    reallocs = tuple(dataclasses.replace(one, predicted_seconds=0.25) for one in plan.reallocs)
    return dataclasses.replace(plan, reallocs=reallocs, extra={LENGTHS: {"prompt": 40.0, "response": 16.0}})


def test_calls_moves_and_the_step_are_predicted() -> None:
    found = predictions(planned())
    assert found["train"] == pytest.approx(SECONDS["train"] * 0.9)
    assert (found["step"], found["realloc/actor"]) == (10.1, 0.25)
    follower = dataclasses.replace(
        planned().reallocs[0], destination="", follower="ref", predicted_seconds=0.5
    )
    both = dataclasses.replace(planned(), reallocs=(*planned().reallocs, follower))
    assert (predictions(both)["realloc/actor"], predictions(both)["realloc/ref"]) == (0.25, 0.5)
    assert predictions(make_plan(predictions=False)) == {}


def test_every_step_writes_both() -> None:
    collector = Collector(grpo(), {"train": 2.0, "ref": 9.0, "step": 8.0, "realloc/actor": 0.25})
    moved = {"realloc/actor/seconds": [0.3, 1.0, 0.3, 0.3]}
    collector.add(0, "train", DispatchDone("train@0", 0, {}, {}, [[12.0, 15.0]]))
    collector.add(0, "realloc:actor:rollout", DispatchDone("realloc:actor@0", 0, moved, {}, [[10.0, 10.3]]))
    metrics = collector.finish(0, 10.0, 20.0)
    pairs = {
        name.removeprefix("plan/predicted_s/"): (seconds, metrics[name.replace("predicted", "measured")])
        for name, seconds in metrics.items()
        if name.startswith("plan/predicted_s/")
    }
    assert pairs == {
        "train": (2.0, 3.0),
        "step": (8.0, 10.0),
        "realloc/actor": (0.25, pytest.approx(0.3)),
    }, "what did not run is not compared"


def test_the_first_step_does_not_count() -> None:
    rows = [
        {"plan/predicted_s/step": 2.0, "plan/measured_s/step": measured} for measured in (50.0, 3.0, 4.0, 5.0)
    ]
    (one,) = seconds_compared(rows)
    assert (one.name, one.predicted, one.measured, one.ratio) == ("step", 2.0, 4.0, 2.0)
    (first,) = seconds_compared(rows[:1])
    assert first.measured == 50.0
    (line,) = lines(rows)
    assert line.split() == ["step", "measured", "4.000", "s", "predicted", "2.000", "s", "(2.00)"]


def test_the_report_shows_both(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    rows = [dict(row) | {"realloc/actor/seconds": 0.5} for row in run.metrics]
    page = render(dataclasses.replace(run, plan=planned(), metrics=tuple(rows)))
    row = next(part for part in page.split("<tr>") if part.startswith("<td>moving weights to actor</td>"))
    assert '<td class="num">0.500</td><td class="num">0.250</td><td class="num">2.00</td>' in row
    step = next(part for part in page.split("<tr>") if part.startswith("<td>step</td>"))
    assert '<td class="num">10.100</td>' in step
    assert "Tokens: assumed and measured" in page and "response</td>" in page


def test_lengths_are_compared_where_they_are_known() -> None:
    rows = [{"response_length/mean": 8.0}, {"response_length/mean": 4.0}]
    found = {one.name: one for one in lengths_compared(planned(), rows, [10.0, 30.0])}
    assert (found["prompt"].predicted, found["prompt"].measured) == (40.0, 20.0)
    assert (found["response"].measured, found["response"].ratio) == (6.0, 0.375)
    assert lengths_compared(make_plan(), rows, [10.0]) == []
    assert lengths_compared(dataclasses.replace(planned(), extra={LENGTHS: "?"}), rows, []) == []
    assert lengths_compared(None, rows, []) == []


def test_the_terminal_says_what_was_predicted() -> None:
    stream = io.StringIO()
    with Progress(2, stream=stream) as progress:
        metrics = {"critic/rewards/mean": 0.5, "plan/predicted_s/step": 8.04}
        progress.update({"kind": "step", "step": 0, "seconds": 10.0, "metrics": metrics})
    assert "10.0 s (predicted 8.0)" in stream.getvalue()
