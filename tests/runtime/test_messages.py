"""Messages survive the way, and nothing else is taken for one."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.runtime.messages import (
    Begin,
    DispatchDone,
    Execute,
    Failed,
    MessageError,
    Open,
    SampleReady,
    decode,
    encode,
)

text = st.text(max_size=20)
numbers = st.floats(allow_nan=False)
ids = st.lists(st.integers(0, 2**60), max_size=8)
messages = st.one_of(
    st.builds(SampleReady, text, st.integers(0, 9), ids, ids),
    st.builds(Failed, st.integers(0, 9), text, text, text),
    st.builds(Open, st.integers(0, 9), text, text, st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)),
    st.builds(
        DispatchDone,
        text,
        st.integers(0, 9),
        stats=st.dictionaries(text, st.lists(numbers, min_size=4, max_size=4), max_size=3),
        values=st.dictionaries(text, numbers, max_size=3),
        spans=st.lists(st.lists(numbers, min_size=2, max_size=2), max_size=3),
    ),
    st.builds(
        Execute,
        st.integers(1, 99),
        text,
        text,
        st.integers(0, 9),
        st.lists(ids, max_size=3),
        st.lists(st.tuples(text, st.integers(0, 9), ids).map(list), max_size=3),
        ids,
        st.booleans(),
    ),
    st.builds(Begin, st.dictionaries(st.integers(0, 99), text, max_size=4)),
)


@given(messages)
def test_roundtrip(message: object) -> None:
    assert decode(encode(message)) == message  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    try:
        message = decode(data)
    except MessageError:
        return
    assert encode(message) is not None


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        (["Ready", 0], "has 1 fields, expected 2"),
        (["Ready", "zero", 1.0], "Ready.rank is str"),
        (["Exec", 1], "unknown kind of message 'Exec'"),
        ({"kind": "Ready"}, r"expected \[kind, ...\]"),
        ([["Ready"], 1], "not a message"),
    ],
)
def test_what_is_wrong_is_said(parts: object, what: str) -> None:
    with pytest.raises(MessageError, match=what):
        decode(msgpack.packb(parts))
