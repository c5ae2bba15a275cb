"""The CUDA kernels: compiled for every architecture; their indexing, run on the CPU thread by thread,
equals the CPU's path; and where there is a GPU, its results do."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.realloc.pack import KINDS, Row, Side, checksums, contiguous, move, rows, table

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90, 100)
KERNELS = {"move": (b"move_kernel", b"checksum_kernel", b"finish_kernel"), "gae": (b"gae_kernel",)}
"""File of csrc/ -> its kernels."""


def test_the_kernels_compile_for_every_architecture(tmp_path: Path) -> None:
    """Skipped on a machine without nvcc, unless it is one that must have it: CI says so."""
    if shutil.which("nvcc") is None:
        without = "nvcc is not installed, so that the CUDA kernels are not compiled"
        if os.environ.get("REALFLOW_REQUIRE_NVCC") == "1":
            pytest.fail(f"{without}; REALFLOW_REQUIRE_NVCC=1 asks for it")
        pytest.skip(without)
    made = subprocess.run(
        ["make", "kernels", "-j2", f"KERNELS={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "MAKEFLAGS": ""},
    )
    assert made.returncode == 0, made.stderr
    assert {path.stem for path in (ROOT / "csrc").glob("*.cu")} == KERNELS.keys()
    for file, kernels in KERNELS.items():
        for number in ARCHITECTURES:
            code = (tmp_path / f"{file}.sm_{number}.cubin").read_bytes()
            assert code[:4] == b"\x7fELF"
            for kernel in kernels:
                assert kernel in code


@pytest.mark.parametrize("required", [True, False])
def test_a_machine_of_ci_without_nvcc_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("REALFLOW_REQUIRE_NVCC", "1" if required else "")
    with pytest.raises(pytest.fail.Exception if required else pytest.skip.Exception, match="nvcc"):
        test_the_kernels_compile_for_every_architecture(tmp_path)


def test_ci_requires_nvcc() -> None:
    assert "export REALFLOW_REQUIRE_NVCC=1\n" in (ROOT / ".ci" / "run").read_text()


def test_the_package_is_built_for_the_same_architectures() -> None:
    makefile, setup = (ROOT / "Makefile").read_text(), (ROOT / "setup.py").read_text()
    assert f"ARCHITECTURES := {' '.join(map(str, ARCHITECTURES))}\n" in makefile
    assert f"CUDA_ARCHITECTURES = {ARCHITECTURES}" in setup


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """`lanes.cpp` as a library."""
    library = tmp_path_factory.mktemp("lanes") / "lanes.so"
    source = Path(__file__).with_name("lanes.cpp")
    # Unaligned accesses, which a GPU refuses, end the process here too (undefined behaviour is trapped).
    checks = ["-fsanitize=alignment,shift,bounds", "-fsanitize-undefined-trap-on-error"]
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", *checks, f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        [os.environ.get("CXX", "c++"), *options, "-o", str(library), str(source)], check=True, timeout=120
    )
    found = ctypes.CDLL(str(library))
    found.lanes_checksum.restype = ctypes.c_uint64
    return found


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]


def ordinary(size: int, seed: int) -> torch.Tensor:
    """At least `size` bytes that are ordinary numbers in every dtype and at every multiple of 2: no NaN,
    whose bits are a processor's own affair."""
    numbers = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 256, (size // 2 + 256,), generator=numbers)
    high = torch.randint(0x3C, 0x42, low.shape, generator=numbers) + 128 * (low % 2)
    return torch.stack([low, high], dim=1).to(torch.uint8).view(-1)


@st.composite
def tables(draw: st.DrawFn) -> Made:
    """A table of pieces that do not overlap where they go, its source and destination, and a decay."""
    found: list[Row] = []
    there, here = draw(st.integers(0, 16)) * 8, draw(st.integers(0, 16)) * 8
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        shape = (*shape[:-1], shape[-1] * draw(st.sampled_from([1, 4, 40])))
        blended = draw(st.booleans())
        kinds = [*KINDS] if blended else [*KINDS, torch.int8, torch.int16]
        one = draw(st.sampled_from(kinds))
        other = draw(st.sampled_from([*KINDS])) if one in KINDS else one
        sides = []
        for dtype, start in ((one, there), (other, here)):
            gap = draw(st.sampled_from([0, 0, 1, 3]))
            strides = contiguous((*shape[:-1], shape[-1] + gap), dtype.itemsize)
            start += -start % dtype.itemsize
            sides.append(Side(0, start, strides, dtype))
        there, here = (
            side.offset + max(length * step for length, step in zip(shape, side.strides, strict=True))
            for side in sides
        )
        if draw(st.booleans()) and one == other and not blended:
            sides[0] = Side(0, sides[0].offset, sides[0].strides[::-1], one)  # transposed
            if len(set(shape)) > 1:
                shape = tuple(min(shape) for _ in shape)
        found.extend(rows(shape, sides[0], sides[1], blended))
    seed = draw(st.integers(0, 2**20))
    source, target = ordinary(there, seed), ordinary(here, seed + 1)
    return table(found), source, target, draw(st.sampled_from([0.0, 0.25, 0.9]))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def emulated(
    lanes: ctypes.CDLL, made: Made, limit: int, count: int, skipped: int = 2**32 - 1
) -> torch.Tensor:
    """What `count` threads make of the destination."""
    moves, source, target, decay = made
    got = target.clone()
    lanes.lanes_move(
        pointer(moves),
        ctypes.c_int64(len(moves)),
        pointer(source),
        pointer(got),
        ctypes.c_double(decay),
        ctypes.c_int64(limit),
        ctypes.c_uint32(count),
        ctypes.c_uint32(skipped),
    )
    return got


@settings(max_examples=150, deadline=None)
@given(tables(), st.sampled_from([16, 64, 4096]), st.sampled_from([1, 7, 32, 256]))
def test_every_thread_together_does_what_the_cpu_does(
    lanes: ctypes.CDLL, made: Made, limit: int, count: int
) -> None:
    moves, source, target, decay = made
    expected = target.clone()
    move([source], moves, [expected], decay)
    assert same(emulated(lanes, made, limit, count), expected)


def test_without_one_thread_something_is_missing(lanes: ctypes.CDLL) -> None:
    """The control of the test above."""
    side = Side(0, 0, (1,), torch.uint8)
    made = (table(list(rows((640,), side, side))), torch.ones(640).byte(), torch.zeros(640).byte(), 0.0)
    assert emulated(lanes, made, 64, 4).all()
    assert emulated(lanes, made, 64, 4, skipped=2).sum() == 640 - 160


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=0, max_size=300), st.sampled_from([1, 3, 64]), st.integers(0, 7))
def test_every_thread_together_finds_the_checksum(
    lanes: ctypes.CDLL, data: bytes, count: int, first: int
) -> None:
    buffer = torch.frombuffer(bytearray(b"\0" * first + data + b"\0"), dtype=torch.uint8)
    expected = checksums(buffer, (first, first + len(data)))[0]
    start = ctypes.c_void_p(buffer.data_ptr() + first)
    got = lanes.lanes_checksum(start, ctypes.c_int64(len(data)), ctypes.c_uint32(count))
    assert got == expected % 2**64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@settings(max_examples=60, deadline=None)
@given(tables())
def test_a_gpu_gives_the_bits_of_the_cpu(made: Made) -> None:
    moves, source, target, decay = made
    expected, there = target.clone(), target.cuda()
    move([source], moves, [expected], decay)
    move([source.cuda()], moves, [there], decay)
    assert same(there.cpu(), expected)
    assert checksums(there, (0, 3, len(there))) == checksums(expected, (0, 3, len(expected)))


@pytest.mark.full
def test_packing_reaches_the_bandwidth_of_memcpy() -> None:
    """At least 0.7 of it for every split, in one process with one thread."""
    script = ROOT / "experiments" / "kernels" / "bench.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = ["--require", "0.7", "--no-record"]
    ran = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, timeout=240, env=environment
    )
    assert ran.returncode == 0, ran.stderr
