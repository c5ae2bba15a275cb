"""Stages of max_new_tokens: read, refused, written back, and counted with their largest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph
from realflow.graph.draw import to_mermaid
from realflow.graph.schema import Wrong
from realflow.graph.stages import LIMITS, plain_limits
from realflow.graph.types import Sampling


@pytest.fixture(scope="module")
def grpo() -> Path:
    return find_graph("grpo")


limits = st.integers(1, 2**20)
stages = st.builds(
    lambda ends, given, last: [*([e, n] for e, n in zip(sorted(ends), given, strict=False)), [None, last]],
    st.sets(st.integers(1, 10**6), min_size=1, max_size=6),
    st.lists(limits, min_size=6, max_size=6),
    limits,
)


@given(stages, st.integers(0, 10**6 + 1))
def test_a_step_has_the_limit_of_the_first_stage_that_has_not_ended(
    found: list[list[int | None]], step: int
) -> None:
    read = LIMITS.read(found)
    assert plain_limits(read) == found
    sampling = Sampling(max(limit for _, limit in read), stages=read)
    left = [limit for end, limit in found if end is None or end > step]
    assert sampling.limit(step) == left[0]
    assert sampling.limit(10**7) == found[-1][1]


@given(limits)
def test_one_limit_is_for_all_steps(limit: int) -> None:
    assert LIMITS.read(limit) == ((None, limit),)
    assert plain_limits(LIMITS.read(limit)) == limit
    assert Sampling(limit).limit(0) == Sampling(limit).limit(10**6) == limit


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([[100, 8], [200, 16]], "the last stage must be"),
        ([[100, 8], [None, 16], [None, 32]], "element 2 never ends"),
        ([[100, 8], [100, 16], [None, 32]], "expected more than 100"),
        ([[100, 8], [50, 16], [None, 32]], "element 2 ends at step 50"),
        ([], "empty"),
        ([[0, 8], [None, 16]], "element 1"),
        ([[None, 0]], "element 1"),
        ([100, 8], "element 1"),
        ("8", ""),
        (True, ""),
    ],
)
def test_wrong_stages(value: object, part: str) -> None:
    with pytest.raises(Wrong) as caught:
        LIMITS.read(value)
    assert part in str(caught.value)


def test_a_graph_with_stages(grpo: Path) -> None:
    graph = load_graph(grpo, ["max_new_tokens=[[20, 16], [null, 64]]"])
    sampling = graph.call("rollout").sampling
    assert sampling is not None
    assert (sampling.max_new_tokens, sampling.stages) == (64, ((20, 16), (None, 64)))
    assert [sampling.limit(step) for step in (0, 19, 20, 44)] == [16, 16, 64, 64]
    assert load_graph(graph_to_mapping(graph)) == graph
    assert "up to 16, then 64 tokens" in to_mermaid(graph)
    falling = load_graph(grpo, ["max_new_tokens=[[20, 64], [null, 16]]"])
    assert falling.call("rollout").sampling == Sampling(64, stages=((20, 64), (None, 16)))


def test_a_graph_with_wrong_stages_says_where(grpo: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_graph(grpo, ["max_new_tokens=[[20, 16]]"])
    assert "calls.rollout.max_new_tokens" in str(caught.value)
    assert "the last stage must be [null, tokens]" in str(caught.value)
