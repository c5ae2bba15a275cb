"""How often a point is repeated, and what is kept of it."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from realflow.profiling.bench import LEAST_REPEATS, ONCE, Bench, Job, repeats_of
from realflow.profiling.request import Setting

times = st.floats(1e-7, 1e3)


@given(times, times, st.floats(-10, 1e3))
def test_repeats_keep_to_the_time(once: float, allowed: float, left: float) -> None:
    found = repeats_of(once, allowed, left, 15)
    assert 0 <= found <= 15 and repeats_of(once, allowed, left, 1) == min(1, found)
    assert (found == 0) == (left <= 0)
    if found > LEAST_REPEATS:
        assert once * found <= allowed * 1.001
    assert once * found <= max(once, 4 * allowed) * 1.001


@pytest.fixture
def bench(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield Bench(0, 1, torch.device("cpu"), time.perf_counter() + 5)
    dist.destroy_process_group()


def job(at: float, values: list[float], made: list[float]) -> Job:
    def make():
        made.append(at)
        given = iter(values * 20)
        return lambda: {"forward": next(given), "backward": 1.0}

    return Job("layer", {"model": "m"}, ("tokens",), (at,), Setting(1, 1), make)


def test_medians_of_each_part_are_kept(bench: Bench) -> None:
    bench.run([job(4, [9.0, 1.0, 2.0, 3.0], []), job(8, [1.0], [])])
    first, second, *_ = bench.rows
    assert first.key == {"model": "m", "threads": 1, "busy": 1, "t": 1, "doing": "forward"}
    assert 1.0 <= first.seconds <= 3.0 and first.noise > 0
    assert (second.key["doing"], second.seconds, second.noise) == ("backward", 1.0, 0.0)
    assert bench.known("layer", (8,), model="m", doing="forward") == 1.0
    assert bench.known("layer", (9,)) is None and bench.skipped == 0


def test_when_time_is_over_the_warm_up_counts(bench: Bench) -> None:
    bench.deadline = time.perf_counter() - 1
    bench.run([job(4, [9.0, 1.0], [])])
    assert (bench.rows[0].seconds, bench.rows[0].noise) == (9.0, ONCE)


def test_points_that_would_take_much_too_long_are_left_out(bench: Bench) -> None:
    made: list[float] = []
    bench.deadline = time.perf_counter() + 0.1
    bench._once["layer", Setting(1, 1)] = (1.0, 4)
    bench.run([job(64, [1.0], made), job(4, [1.0], made)])
    assert made == [4] and bench.skipped == 1
