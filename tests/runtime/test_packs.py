"""Which micro-batch a sample is in: under the budget, or, with the option `alone`, by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.graph import find_graph, load_graph
from realflow.graph.types import Graph
from realflow.runtime.assign import packs


@pytest.fixture(scope="module")
def recipes() -> Graph:
    return load_graph(find_graph("recipes"))


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 300))
def test_every_sample_is_in_one_micro_batch(recipes: Graph, lengths: list[int], budget: int) -> None:
    ids = [7 + 3 * place for place in range(len(lengths))]
    packed = packs(recipes, recipes.call("prox"), ids, lengths, budget)
    assert sorted(place for part in packed for place in part) == list(range(len(ids)))
    assert all(len(part) == 1 or sum(lengths[place] for place in part) <= budget for part in packed)
    alone = packs(recipes, recipes.call("again"), ids, lengths, budget)
    assert alone == [[place] for place in range(len(ids))]


def test_what_the_probe_compares_is_packed_otherwise(recipes: Graph) -> None:
    """The control: without its option the second pass repeats the first, and would find no noise."""
    prox, again = recipes.call("prox"), recipes.call("again")
    packed = packs(recipes, prox, range(8), [50] * 8, 4096)
    assert packed == [list(range(8))] != packs(recipes, again, range(8), [50] * 8, 4096)
    plain = replace(again, options={**again.options, "alone": False})
    assert packs(recipes, plain, range(8), [50] * 8, 4096) == packed
