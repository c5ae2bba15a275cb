"""What goes between a tester and a candidate: plain values whole, and nothing that harms."""

from __future__ import annotations

import io
import json
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.rewards.sandbox.inside.wire import LONGEST, Gone, NotCarried, Wire


def wire(text: bytes = b"") -> Wire:
    return Wire(io.BytesIO(text), io.BytesIO(), lambda number: ("object", number), lambda value: None)


KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats(allow_nan=False)
VALUES = st.recursive(
    KEYS | st.complex_numbers(allow_nan=False) | st.decimals(allow_nan=False) | st.fractions(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner)
        | st.sets(KEYS)
        | st.frozensets(KEYS)
        | st.binary().map(bytearray)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_plain_values_arrive_whole(value):
    sent = json.loads(json.dumps(wire().encode(value)))
    found = wire().decode(sent)
    assert found == value and type(found) is type(value)


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_whatever_arrives_is_a_plain_value_or_refused(message):
    """Also what no wire has sent."""
    try:
        found = wire().decode(message)
    except Gone:
        return
    allowed = (type(None), int, str, list, dict, tuple, set, frozenset, bytes, bytearray, float, complex)
    assert isinstance(found, (*allowed, Decimal, Fraction))


def test_subclasses_become_what_they_stand_for():
    class Sly(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    class Text(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    for value, plain in ((Sly(3), int), (Text("a"), str), (True, bool)):
        assert type(wire().decode(json.loads(json.dumps(wire().encode(value))))) is plain


def test_objects_stay_where_they_are():
    one = wire()
    sent = one.encode([object(), print])
    assert [kind for item in sent for kind in item] == ["o", "o"]
    assert one.own(sent[1]["o"]) is print
    with pytest.raises(Gone, match="was not given"):
        one.own(sent[1]["o"] + 1)
    with pytest.raises(Gone):
        one.own("x")


def test_a_value_within_itself_is_not_carried():
    value: list[object] = []
    value.append(value)
    with pytest.raises(NotCarried):
        wire().encode(value)


@pytest.mark.parametrize(
    "line",
    [b"", b"no json\n", b"3\n", b"[" * 100_000 + b"\n", b'{"a": 1}', b'{"i": "' + b"9" * (LONGEST + 5)],
)
def test_broken_messages(line):
    with pytest.raises(Gone):
        wire(line).receive()
