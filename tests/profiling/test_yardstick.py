"""A fixed piece of work, and what a machine's pace makes of measurements."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realflow.commands.profile import measure_yardstick
from realflow.profiling.models import uneven
from realflow.profiling.yardstick import LEAST, PIECES, Pace, Yardstick, capped_mean

seconds = st.floats(1e-4, 10.0)


@given(st.lists(seconds, min_size=1, max_size=30))
def test_a_capped_mean_lies_among_the_values_and_knows_no_outliers(values: list[float]) -> None:
    found, middle = capped_mean(values), statistics.median(values)
    assert min(values) * 0.999 <= found <= min(max(values), 2 * middle) * 1.001
    if max(values) <= 2 * middle:
        assert found == pytest.approx(statistics.fmean(values))


@given(st.lists(st.floats(0.5, 2.0), min_size=3 * LEAST, max_size=60), st.floats(0.5, 3.0))
def test_a_slow_half_of_a_measurement_is_given_at_the_mean_pace(noise: list[float], slower: float) -> None:
    pace, half = Pace(), len(noise) // 2
    for index in range(len(noise)):  # one a second; the second half is slower
        pace.add(float(index), slower if index >= half else 1.0)
    early, late = pace.factor(0.0), pace.factor(len(noise) - 1.0)
    assert late / early == pytest.approx(slower)
    assert pace.factor(-1e6) == pytest.approx(early) and pace.factor(1e6) == pytest.approx(late)


@given(st.integers(1, 200), st.integers(1, 600))
def test_uneven_lengths_have_the_mean_that_was_asked_for(count: int, length: int) -> None:
    found = uneven(count, length)
    assert sum(found) == count * length and len(found) == count
    assert all(2 * length <= 3 * one <= 4 * length for one in found)
    if length >= 15 and count >= 2:
        assert len(set(found)) > 1


def test_the_yardstick_measures_work() -> None:
    yardstick = Yardstick(torch.device("cpu"))
    assert set(yardstick.seconds()) == set(PIECES) and min(yardstick.seconds().values()) > 0
    assert torch.isfinite(yardstick._result).all() and bool(
        (yardstick._shares.sum(-1) - 1).abs().max() < 1e-4
    )


def test_the_command_of_a_profile_measures_it_in_a_process() -> None:
    found = measure_yardstick(0.05)
    assert set(found) == set(PIECES) and all(1e-5 < one < 60 for one in found.values())
