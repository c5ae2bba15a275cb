"""The packing kernels against torch's own copies."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow import kernels
from realflow.errors import InputError, RunError
from realflow.realloc.pack import Row, Side, checksums, contiguous, move, rows, table

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


def checksum(tensor: torch.Tensor) -> int:
    """That of all of a tensor's bytes."""
    data = as_bytes(tensor)
    return checksums(data, (0, len(data)))[0]


def pack(views: list[torch.Tensor], buffer: torch.Tensor) -> int:
    """Into `buffer` without gaps; the bytes written."""
    found, total = beside(views, into=True)
    move(views, found, [buffer])
    return total


def unpack(buffer: torch.Tensor, views: list[torch.Tensor]) -> int:
    """What `pack` put there, back; the bytes read."""
    found, total = beside(views, into=False)
    move([buffer], found, views)
    return total


def beside(views: list[torch.Tensor], into: bool) -> tuple[torch.Tensor, int]:
    """The table that packs views, or unpacks them, and the bytes."""
    found: list[Row] = []
    packed = 0
    for index, view in enumerate(views):
        there, here = (
            side(view, index),
            Side(0, packed, contiguous(view.shape, view.element_size()), view.dtype),
        )
        found.extend(rows(view.shape, there, here) if into else rows(view.shape, here, there))
        packed += view.numel() * view.element_size()
    return table(found), packed


@quick
@given(found=st.lists(views(), max_size=5))
def test_pack_and_unpack_equal_torch(found: list[torch.Tensor]) -> None:
    expected = torch.cat([torch.zeros(0, dtype=torch.uint8), *map(as_bytes, found)])
    buffer = torch.full((len(expected) + 3,), 7, dtype=torch.uint8)
    assert pack(found, buffer) == len(expected)
    assert torch.equal(buffer[: len(expected)], expected)
    assert buffer[len(expected) :].tolist() == [7, 7, 7]
    before = [view.clone() for view in found]
    for view in found:
        view.zero_()
    assert unpack(buffer, found) == len(expected)
    assert all(torch.equal(view, old) for view, old in zip(found, before, strict=True))


def side(view: torch.Tensor, base: int = 0) -> Side:
    size = view.element_size()
    return Side(base, 0, tuple(step * size for step in view.stride()), view.dtype)


NUMBERS = [torch.float64, torch.float32, torch.bfloat16]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two strided views of one shape, of numbers that lie densely around where bfloat16 rounds."""
    source = draw(views()).to(torch.float64).contiguous()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    source = torch.randn(source.shape, generator=generator, dtype=torch.float64) * scale
    if draw(st.booleans()) and source.numel():
        source.view(-1)[0] = draw(st.sampled_from([float("inf"), -0.0, 1e-42, 1e300, 65280.5 * 2**112]))
    order = draw(st.permutations(range(source.dim())))
    inverse = [order.index(dim) for dim in range(source.dim())]
    source = source.permute(order).contiguous().permute(inverse)
    target = torch.randn(source.shape, generator=generator, dtype=torch.float64)
    return source.to(draw(st.sampled_from(NUMBERS))), target.to(draw(st.sampled_from(NUMBERS)))


@quick
@given(pairs())
def test_casts_give_the_bits_of_torch(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    source, target = pair
    move([source], table(list(rows(source.shape, side(source), side(target)))), [target])
    assert torch.equal(as_bytes(target), as_bytes(source.to(target.dtype)))


@quick
@given(pairs(), st.floats(0, 1))
def test_an_average_gives_the_bits_of_torch(pair: tuple[torch.Tensor, torch.Tensor], decay: float) -> None:
    """dst = decay * dst + (1 - decay) * src, each step rounded in the wider of float32 and the two."""
    source, target = pair
    wide = torch.promote_types(torch.promote_types(source.dtype, target.dtype), torch.float32)
    keep, take = torch.tensor(decay, dtype=wide), torch.tensor(1 - decay, dtype=wide)
    expected = (target.to(wide) * keep + source.to(wide) * take).to(target.dtype)
    found = list(rows(source.shape, side(source), side(target), blended=True))
    move([source], table(found), [target], decay)
    assert torch.equal(target.nan_to_num(), expected.nan_to_num())


def test_nan_stays_nan() -> None:
    for start in NUMBERS:
        for end in NUMBERS:
            source, target = torch.full((9,), float("nan"), dtype=start), torch.zeros(9, dtype=end)
            move([source], table(list(rows((9,), side(source), side(target)))), [target])
            assert target.isnan().all()


def test_what_cannot_be_converted_is_refused() -> None:
    for start, end in ((torch.int16, torch.bfloat16), (torch.float16, torch.bfloat16)):
        with pytest.raises(InputError, match="cannot be converted"):
            list(rows((2,), Side(0, 0, (2,), start), Side(0, 0, (2,), end)))
    with pytest.raises(InputError, match="cannot be averaged"):
        list(rows((2,), Side(0, 0, (8,), torch.int64), Side(0, 0, (8,), torch.int64), blended=True))


@quick
@given(views())
def test_rows_cover_a_view_once_in_order(view: torch.Tensor) -> None:
    """Both sides of the table, element by element."""
    size = view.element_size()
    shape = tuple(view.shape)
    offsets = torch.arange(view.untyped_storage().nbytes() // size).as_strided(view.shape, view.stride())
    there: list[int] = []
    here: list[int] = []
    for row in rows(shape, side(view), Side(0, 0, contiguous(shape, size), view.dtype)):
        assert (row[0], row[4], row[11:]) == (0, 0, (0, 0, 0))
        for group in range(row[8]):
            for index in range(row[9]):
                for byte in range(0, row[10], size):
                    there.append(row[1] + group * row[2] + index * row[3] + byte)
                    here.append(row[5] + group * row[6] + index * row[7] + byte)
    assert there == [index * size for index in offsets.flatten().tolist()]
    assert here == list(range(0, view.numel() * size, size))


def test_usual_cuts_are_single_rows() -> None:
    """A block of rows, of columns, and of rows and columns in every expert of a stack."""
    whole = torch.zeros(5, 64, 32)

    def found(view: torch.Tensor) -> list[tuple[int, ...]]:
        return [
            row[8:11]
            for row in rows(view.shape, side(view), Side(0, 0, contiguous(view.shape, 4), view.dtype))
        ]

    assert found(whole) == [(1, 1, whole.numel() * 4)]
    assert found(whole[1:3]) == [(1, 1, 2 * 8192)]
    assert found(whole[0, :, :8]) == [(1, 64, 32)]
    assert found(whole[:, 8:16]) == [(1, 5, 8 * 128)]
    assert found(whole[:, 8:16, 4:8]) == [(5, 8, 16)]
    assert found(torch.zeros(())) == [(1, 1, 4)]


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


def test_many_bytes_take_the_way_around_the_caches() -> None:
    """From 8 MiB on; rows that begin anywhere in a line, and rows shorter and longer than a line."""
    for columns, first in ((700, 3), (256, 0), (1024, 64), (4099, 1)):
        count = (9 << 20) // columns
        source = torch.randint(0, 255, (count, columns + 77), dtype=torch.uint8)[:, first : first + columns]
        expected = source.contiguous().view(-1)
        buffer = torch.zeros(len(expected) + 1, dtype=torch.uint8)[1:]
        assert pack([source], buffer) == len(expected)
        assert torch.equal(buffer, expected)
        target = torch.zeros(count, columns + 5, dtype=torch.uint8)
        unpack(buffer, [target[:, 2:-3]])
        assert torch.equal(target[:, 2:-3], source)
        assert not target[:, :2].any() and not target[:, -3:].any()


def test_the_kernel_refuses_what_leaves_its_memory() -> None:
    tensor = torch.zeros(8, dtype=torch.uint8)
    good = [0, 0, 0, 4, 0, 8, 0, 4, 1, 2, 4, 0, 0, 0]

    def attempt(changes: dict[int, int]) -> None:
        row = [changes.get(column, value) for column, value in enumerate(good)]
        move([tensor], torch.tensor([row]), [torch.zeros(16, dtype=torch.uint8)])

    attempt({})
    attempt({8: 0, 1: 99})  # nothing to move
    for changes in (
        {0: 1},  # no such source
        {4: -1},  # no such destination
        {1: 1},  # past the end of the source
        {1: -1},
        {3: 5},  # the last row leaves the source
        {5: 9},  # past the end of the destination
        {7: -1},
        {8: 2, 2: 1},  # the last group leaves the source
        {9: 2**62, 3: 2**62},  # overflows
        {8: 2**40, 9: 2**40, 3: 0, 7: 0},  # no room for the product
        {11: 2},  # bytes on one side, numbers on the other
        {11: 9, 12: 9},
        {13: 1},  # bytes cannot be averaged
        {11: 2, 12: 2},  # 4 numbers of 4 bytes leave the source
    ):
        with pytest.raises(RuntimeError, match=r"realflow\.move"):
            attempt(changes)


@pytest.mark.parametrize("bounds", [[0, 9], [4, 2], [-1, 2]])
def test_checksums_refuse_ranges_outside_of_the_buffer(bounds: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"realflow\.checksums"):
        checksums(torch.zeros(8, dtype=torch.uint8), bounds)


def test_checksums_of_ranges_are_those_of_the_parts() -> None:
    buffer = torch.randint(0, 255, (700_003,), dtype=torch.uint8)
    bounds = [0, 1, 1, 300, 300_001, 700_003]
    parts = [buffer[low:high] for low, high in pairwise(bounds)]
    assert checksums(buffer, bounds) == [checksum(part) for part in parts]


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
    assert checksums(tensor, (0, 0))[0] != before


def test_kernels_that_are_not_built_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="make setup"):
        kernels.operators.__wrapped__()


def test_a_device_without_kernels_is_named() -> None:
    there = torch.zeros(4, device="meta")
    with pytest.raises(RunError, match="not built for meta"):
        move([there], torch.zeros(1, 14, dtype=torch.int64), [there])
