"""Binding of MPI ranks to the plan's devices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.errors import InputError
from realflow.planfile import Cluster, Node
from realflow.runtime.bootstrap import Place, bind

TWO = Cluster((Node("n1", 2), Node("n2", 3)))


@given(st.permutations([Place("n1", 0), Place("n1", 1), Place("n2", 0), Place("n2", 1), Place("n2", 2)]))
def test_any_order_of_mpi_ranks_is_bound_one_to_one(places: list[Place]) -> None:
    ranks = bind(TWO, places)
    assert sorted(ranks) == [0, 1, 2, 3, 4]
    for place, rank in zip(places, ranks, strict=True):
        assert TWO.devices[rank] == f"{place.host}:{place.local_index}"


def test_full_host_names_and_the_local_node() -> None:
    cluster = Cluster((Node("n1", 1), Node("n2.cluster", 1)))
    assert bind(cluster, [Place("n2.cluster", 0), Place("n1.cluster", 0)]) == [1, 0]
    assert bind(Cluster((Node("local", 2),)), [Place("any", 1), Place("any", 0)]) == [1, 0]


@pytest.mark.parametrize(
    ("cluster", "places", "what"),
    [
        (TWO, [Place("n1", 0)], "for 5 devices, but mpirun started 1 ranks"),
        (Cluster((Node("local", 2),)), [Place("a", 0), Place("b", 0)], r"one machine, but .*\['a', 'b'\]"),
        (Cluster((Node("n1", 2),)), [Place("n1", 0), Place("n3", 0)], "number 0 on n3, where"),
        (Cluster((Node("n1", 2),)), [Place("n1", 0), Place("n1", 0)], "two ranks claim one device"),
    ],
)
def test_what_does_not_fit_is_refused(cluster: Cluster, places: list[Place], what: str) -> None:
    with pytest.raises(InputError, match=what):
        bind(cluster, places)
