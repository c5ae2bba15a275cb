"""The stateless shuffle: a permutation for any size, seed and epoch, and a well-mixed one."""

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.data.shuffle import permute


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 600), st.integers(-5, 2**70), st.integers(0, 1000))
def test_is_a_permutation(size, seed, epoch):
    assert sorted(permute(i, size, seed=seed, epoch=epoch) for i in range(size)) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 2**62), st.data())
def test_stays_inside_any_range(size, data):
    place = data.draw(st.integers(0, size - 1))
    found = permute(place, size, seed=1)
    assert 0 <= found < size and found == permute(place, size, seed=1)


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        return tuple(permute(i, 100, seed=seed, epoch=epoch) for i in range(100))

    assert len({order(seed, epoch) for seed in range(10) for epoch in range(10)}) == 100


def test_small_ranges_reach_all_orders_evenly():
    orders = Counter(tuple(permute(i, 4, seed=seed) for i in range(4)) for seed in range(4800))
    assert len(orders) == 24
    assert sum((n - 200) ** 2 / 200 for n in orders.values()) < 60  # chi-square, 23 degrees: 1e-5 beyond


def test_neighbours_are_torn_apart():
    """Mean distance of neighbours in a random order of n is (n + 1) / 3; kept order would have 1."""
    order = [permute(i, 5000, seed=3) for i in range(5000)]
    mean = sum(abs(a - b) for a, b in pairwise(order)) / 4999
    assert abs(mean - 5001 / 3) < 60
    fixed = sum(place == i for i, place in enumerate(order))
    assert fixed < 10  # 1 expected
