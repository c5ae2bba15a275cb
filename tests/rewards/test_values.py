"""What a function may return is what can be stored and sent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.engines.values import BadValue, is_json, plain
from realflow.errors import RunError
from realflow.runtime.store import FieldStore

integers = st.integers(-(2**65), 2**65)
scalars = st.none() | st.booleans() | integers | st.floats() | st.text(max_size=4) | st.binary(max_size=2)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def stored(value: Any) -> bool:
    try:
        FieldStore().put("x", {0: value})
    except RunError:
        return False
    return True


@given(values)
def test_accepted_is_what_the_store_keeps(value: Any) -> None:
    assert is_json(value) == stored(value)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [nested(32), nested(33), {"a": nested(31)}, {"a": nested(32)}])
def test_depth(value: Any) -> None:
    assert is_json(value) == stored(value)


@pytest.mark.parametrize("value", [(1, 2), {"a": (1,)}, {1: 2}, 2**64, b"x", nested(33)])
def test_what_is_refused_says_why(value: Any) -> None:
    with pytest.raises(BadValue, match="64-bit int, float, text, list, or dict with text keys"):
        plain(value, "any")


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_whole_numbers_have_64_bits(value: int) -> None:
    assert plain(2**63 - 1, "int") == 2**63 - 1
    with pytest.raises(BadValue, match="a whole number of 64 bits"):
        plain(value, "int")
