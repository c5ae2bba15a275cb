"""Distinct rows and the held-out part: as by a dict of digests, in a part of its memory."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.data import distinct as module
from realflow.data.distinct import distinct


def by_a_dict(texts, test, use, digest):
    first = {}
    for index, text in enumerate(texts):
        first.setdefault(digest(text), index)
    order = sorted(first)
    held_out = round(test * len(order))
    return sorted(first[d] for d in (order[:held_out] if use == "test" else order[held_out:]))


def weak(text):
    """Many texts are equal in the first eight bytes, and few in all sixteen."""
    full = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return bytes([full[0] % 3]) * 8 + full


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.text("abc", max_size=3), min_size=1, max_size=60),
    st.floats(0, 0.99),
    st.sampled_from(["train", "test"]),
    st.booleans(),
)
def test_as_by_a_dict(texts, test, use, collide):
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr(module, "_digest", weak)
        wanted = by_a_dict(texts, test, use, module._digest)
        found = distinct(texts.__getitem__, len(texts), test=test, use=use)
        assert list(found) == wanted
        assert all(type(index) is int for index in found)


def test_texts_are_told_apart_by_more_than_the_first_bytes():
    """The control: without the second look, texts that collide would be taken for one."""
    texts = [f"t{i}" for i in range(50)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_digest", weak)
        assert len(distinct(texts.__getitem__, 50, test=0, use="train")) == 50
        patch.setattr(module, "_digest", lambda text: weak(text)[:8])
        assert len(distinct(texts.__getitem__, 50, test=0, use="train")) == 3
