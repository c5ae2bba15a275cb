"""From the reports of ranks to the metrics of a step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from realflow.observe.collect import Collector
from realflow.runtime.messages import DispatchDone

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from scenes import grpo


def test_ranks_and_pieces_are_merged() -> None:
    collector = Collector(grpo(), {"train": 2.0})
    rewards = "critic/rewards"
    pieces = [[3.0, 3.0, 0.5, 1.5], [1.0, 1.0, 1.0, 1.0]]
    for rank, stats in enumerate(pieces):
        collector.add(0, "reward", DispatchDone(f"reward@0.{rank}", rank, {rewards: stats}))
    share = "response_length/clip_ratio"
    collector.add(
        0, "rollout", DispatchDone("rollout@0", 0, {share: [1.0, 4.0, 0.0, 1.0]}, {}, [[10.0, 12.0]])
    )
    for rank, end in enumerate([14.0, 15.0]):
        done = DispatchDone("train@0", rank, {}, {"actor/loss": 0.5}, [[12.0, end]])
        collector.add(0, "train", done)
    metrics = collector.finish(0, 10.0, 20.0)
    assert (metrics[f"{rewards}/mean"], metrics[f"{rewards}/min"], metrics[f"{rewards}/max"]) == (
        1.0,
        0.5,
        1.5,
    )
    assert metrics[share] == 0.25
    assert metrics["actor/loss"] == 0.5
    assert metrics["timing_s/train"] == metrics["plan/measured_s/train"] == 3.0
    assert metrics["plan/predicted_s/train"] == 2.0
    assert metrics["timing_s/step"] == 10.0
    assert metrics["perf/idle_fraction"] == pytest.approx(0.5)


def test_texts_that_were_too_long_are_added_up() -> None:
    collector = Collector(grpo(), {})
    for rank, numbers in enumerate([[2.0, 6.0, 0.0, 1.0], [1.0, 6.0, 0.0, 1.0]]):
        collector.add(0, "rollout", DispatchDone("rollout@0", rank, {"data/dropped": numbers}))
    metrics = collector.finish(0, 0.0, 1.0)
    assert (metrics["data/dropped"], metrics["data/dropped_ratio"]) == (3.0, 0.25)
    assert "data/dropped/mean" not in metrics


def test_what_follows_at_the_end_of_a_step_counts_for_it() -> None:
    """Its bytes and seconds; the time that it takes of the next step's is that one's."""
    collector = Collector(grpo(), {})
    stats = {"realloc/ref/bytes": [8.0, 1.0, 8.0, 8.0], "realloc/ref/seconds": [0.5, 1.0, 0.5, 0.5]}
    done = DispatchDone("realloc:ref:actor@0", 0, stats, {}, [[2.0, 2.5]])
    for step in (0, 1):
        collector.add(step, "realloc:ref:actor", done)
        metrics = collector.finish(step, 1.0 + step, 2.0 + step)
        assert (metrics["realloc/ref/bytes"], metrics["realloc/ref/seconds"]) == (8.0, 0.5)
        assert metrics["perf/idle_fraction"] == pytest.approx(1.0 - 0.5 * step)
    assert "realloc/ref/bytes" not in collector.finish(2, 3.0, 4.0)


def test_what_happens_between_steps_counts_for_the_next() -> None:
    collector = Collector(grpo(), {})
    for rank, (received, seconds) in enumerate([(100.0, 0.1), (50.0, 0.3)]):
        stats = {
            "realloc/actor/bytes": [received, 1.0, received, received],
            "realloc/actor/seconds": [seconds, 1.0, seconds, seconds],
        }
        done = DispatchDone("realloc:actor:rollout@v2", rank, stats, {}, [[1.0, 1.0 + seconds]])
        collector.add(-1, "realloc:actor:rollout", done)
    other = {"realloc/actor/bytes": [8.0, 1.0, 8.0, 8.0], "realloc/actor/seconds": [0.5, 1.0, 0.5, 0.5]}
    collector.add(-1, "realloc:actor:probe", DispatchDone("realloc:actor:probe@v2", 0, other))
    metrics = collector.finish(1, 1.0, 2.0)
    assert metrics["realloc/actor/bytes"] == 158.0, "of all ranks"
    assert metrics["realloc/actor/seconds"] == 0.3 + 0.5, "of the slowest rank, of both moves"
    assert metrics["perf/idle_fraction"] == pytest.approx(0.7)
    assert "realloc/actor/bytes" not in collector.finish(2, 2.0, 3.0)
