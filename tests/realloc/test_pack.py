"""The packing kernels against torch's own copies."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.errors import RunError
from realflow.realloc import pack as packing
from realflow.realloc.pack import checksum, pack, pack_each, runs, unpack, unpack_each

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int16, torch.uint8, torch.bool]
quick = settings(max_examples=100, deadline=None)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A strided view of fresh random storage: cut, stepped and transposed."""
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    base = torch.randint(0, 2, [size * 2 + 1 for size in shape], dtype=torch.uint8)
    base = base.to(draw(st.sampled_from(DTYPES)))
    for dim, size in enumerate(shape):
        base = base.narrow(dim, draw(st.integers(0, 1)), size * 2)
        base = (
            base[(slice(None),) * dim + (slice(None, None, 2),)]
            if draw(st.booleans())
            else base.narrow(dim, 0, size)
        )
    return base.permute(draw(st.permutations(range(base.dim()))))


def as_bytes(view: torch.Tensor) -> torch.Tensor:
    """The view's bytes in row-major order."""
    return view.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


@pytest.mark.parametrize(("gather", "scatter"), [(pack, unpack), (pack_each, unpack_each)])
@quick
@given(found=st.lists(views(), max_size=5))
def test_pack_and_unpack_equal_torch(gather: Any, scatter: Any, found: list[torch.Tensor]) -> None:
    expected = torch.cat([torch.zeros(0, dtype=torch.uint8), *map(as_bytes, found)])
    buffer = torch.full((len(expected) + 3,), 7, dtype=torch.uint8)
    assert gather(found, buffer) == len(expected)
    assert torch.equal(buffer[: len(expected)], expected)
    assert buffer[len(expected) :].tolist() == [7, 7, 7]
    before = [view.clone() for view in found]
    for view in found:
        view.zero_()
    assert scatter(buffer, found) == len(expected)
    assert all(torch.equal(view, old) for view, old in zip(found, before, strict=True))


@quick
@given(views())
def test_runs_cover_a_view_once_in_order(view: torch.Tensor) -> None:
    size = view.element_size()
    offsets = torch.arange(view.untyped_storage().nbytes() // size).as_strided(view.shape, view.stride())
    found = [
        offset + row * step + byte
        for offset, rows, length, step in runs(view.shape, view.stride(), size)
        for row in range(rows)
        for byte in range(0, length, size)
    ]
    assert found == [index * size for index in offsets.flatten().tolist()]


def test_usual_cuts_are_single_runs() -> None:
    matrix = torch.zeros(64, 32)
    assert runs(matrix.shape, matrix.stride(), 4) == [(0, 1, 8192, 8192)]
    columns = matrix[:, :8]
    assert runs(columns.shape, columns.stride(), 4) == [(0, 64, 32, 128)]
    assert runs((), (), 4) == [(0, 1, 4, 4)]


def test_large_pieces_are_cut_into_blocks() -> None:
    threads = torch.get_num_threads()
    wide = torch.randint(0, 255, (3, 700_001), dtype=torch.uint8)
    tall = torch.randint(0, 255, (5000, 300), dtype=torch.uint8)[:, 3:203]
    expected = torch.cat([as_bytes(wide[:, 1:]), as_bytes(tall)])
    buffer = torch.empty_like(expected)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            buffer.zero_()
            pack([wide[:, 1:], tall], buffer)
            assert torch.equal(buffer, expected)
            targets = [torch.zeros_like(wide), torch.zeros(5000, 300, dtype=torch.uint8)]
            unpack(buffer, [targets[0][:, 1:], targets[1][:, 3:203]])
            assert torch.equal(targets[0][:, 1:], wide[:, 1:]) and not targets[0][:, 0].any()
            assert torch.equal(targets[1][:, 3:203], tall) and not targets[1][:, 203:].any()
            assert checksum(wide) == checksum(wide.clone())
    finally:
        torch.set_num_threads(threads)


def test_the_kernel_refuses_what_leaves_its_memory() -> None:
    tensor = torch.zeros(8, dtype=torch.uint8)
    operators = packing._operators()

    def attempt(row: list[int], room: int = 16) -> None:
        operators.pack([tensor], torch.tensor([row]), torch.zeros(room, dtype=torch.uint8))

    attempt([0, 0, 2, 4, 4, 8])
    for row in (
        [1, 0, 1, 4, 4, 0],  # no such tensor
        [0, 5, 1, 4, 4, 0],  # past the end of the storage
        [0, -1, 1, 4, 4, 0],
        [0, 0, 2, 4, 5, 0],  # the last row leaves it
        [0, 0, 1, 4, 4, 13],  # past the end of the buffer
        [0, 0, 2**62, 4, 2**62, 0],  # overflows
    ):
        with pytest.raises(RuntimeError, match=r"realflow\.pack"):
            attempt(row)


@quick
@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_checksum_sees_every_bit_and_its_place(data: bytes, choose: st.DataObject) -> None:
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    before = checksum(tensor)
    place = choose.draw(st.integers(0, len(data) - 1))
    flipped = tensor.clone()
    flipped[place] ^= 1 << choose.draw(st.integers(0, 7))
    assert checksum(flipped) != before
    rolled = tensor.roll(1)
    assert (checksum(rolled) == before) == torch.equal(rolled, tensor)
    assert checksum(torch.cat([tensor, torch.zeros(1, dtype=torch.uint8)])) != before


def test_a_checksum_ignores_strides() -> None:
    tensor = torch.randn(300, 500)
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous())
    assert checksum(tensor[:, ::2]) == checksum(tensor[:, ::2].clone())
    assert checksum(torch.zeros(0)) == checksum(torch.zeros(0))


def test_kernels_that_are_not_built_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="make setup"):
        packing._operators.__wrapped__()


def test_bandwidth_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    matrix = torch.zeros(8192, 2048, dtype=torch.bfloat16)
    buffer = torch.empty(matrix.numel() * 2, dtype=torch.uint8)
    for what, found in (("rows", [matrix]), ("columns", [matrix[:, :1024], matrix[:, 1024:]])):
        pack(found, buffer)
        started = time.perf_counter()
        pack(found, buffer)
        packed = buffer.numel() / (time.perf_counter() - started)
        with capsys.disabled():
            print(f"\npack {what}: {packed / 1e9:.1f} GB/s")
