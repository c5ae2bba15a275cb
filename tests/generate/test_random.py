"""The counter-based generator: known answers, uniformity, independence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realflow.data.random import philox, uniform

# Counter, key and result of Philox4x32-10 as published with its authors' library (Random123).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def excess(counts: np.ndarray) -> float:
    """How many standard deviations chi-square of equal cells lies above its mean."""
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, result):
    words = tuple(np.array([word], dtype=np.uint64) for word in counter)
    assert tuple(int(word[0]) for word in philox(words, key)) == result


@given(
    seed=st.integers(0, 2**63 - 1),
    ids=st.lists(st.integers(0, 2**62), min_size=1, max_size=5),
    positions=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
    turn=st.integers(0, 100),
)
def test_a_draw_depends_on_its_counter_alone(seed, ids, positions, turn):
    table = uniform(seed, torch.tensor(ids)[:, None], turn, torch.tensor(positions))
    assert table.shape == (len(ids), len(positions))
    assert table.dtype == torch.float64
    assert bool(((table >= 0) & (table < 1)).all())
    for row, sample in enumerate(ids):
        for column, position in enumerate(positions):
            assert table[row, column] == uniform(seed, sample, turn, position)


def test_draws_are_uniform():
    draws = uniform(1, torch.arange(400)[:, None], 0, torch.arange(500)).flatten().numpy()
    ranks = np.arange(1, draws.size + 1) / draws.size
    distance = np.abs(np.sort(draws) - ranks).max()
    assert distance * np.sqrt(draws.size) < 1.95  # Kolmogorov and Smirnov: p = 0.001
    lowest_bits = (draws * 2**53).astype(np.int64) & 0xFF
    assert excess(np.bincount(lowest_bits, minlength=256)) < 4


@pytest.mark.parametrize("change", ["seed", "sample", "turn", "position"])
def test_neighbouring_counters_are_independent(change):
    step = {name: int(name == change) for name in ("seed", "sample", "turn", "position")}
    ids, positions = torch.arange(300)[:, None], torch.arange(300)
    first = uniform(7, ids, 0, positions).flatten().numpy()
    second = uniform(7 + step["seed"], ids + step["sample"], step["turn"], positions + step["position"])
    second = second.flatten().numpy()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    cells = np.histogram2d(first, second, bins=10, range=[[0, 1], [0, 1]])[0].ravel()
    # Shifted tables share most of their numbers, one place apart: pairs are independent all the same.
    assert excess(cells) < 4


def test_negative_ids_are_refused():
    with pytest.raises(AssertionError):
        uniform(1, -1, 0, 0)
