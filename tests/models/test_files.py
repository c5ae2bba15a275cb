"""`realflow.files`: whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.files import beside, file_digest


@given(st.binary(max_size=4096))
def test_digest_and_content(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    target = tmp_path_factory.mktemp("files") / "a.bin"
    with beside(target) as partial:
        partial.write_bytes(content)
        assert not target.exists() and partial.parent == target.parent
    assert target.read_bytes() == content
    assert file_digest(target) == hashlib.sha256(content).hexdigest()
    assert [path.name for path in target.parent.iterdir()] == ["a.bin"]


def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"before")
    with pytest.raises(OSError, match="full"), beside(target) as partial:
        partial.write_bytes(b"aft")
        raise OSError("disk full")
    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
