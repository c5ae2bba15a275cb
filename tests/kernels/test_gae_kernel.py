"""The GPU's way through a sample, run on the CPU by 32 threads in lockstep, gives the bits of the CPU's."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.algorithms.advantages import gae
from realflow.kernels import operators

ROOT = Path(__file__).resolve().parents[2]
GAMMA, LAM = 0.97, 0.9


@pytest.fixture(scope="module")
def warps(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """`gae_warps.cpp` as a library."""
    library = tmp_path_factory.mktemp("warps") / "warps.so"
    source = Path(__file__).with_name("gae_warps.cpp")
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        [os.environ.get("CXX", "c++"), *options, "-o", str(library), str(source)], check=True, timeout=120
    )
    return ctypes.CDLL(str(library))


def batch(lengths: list[int], share: float, seed: int) -> dict[str, torch.Tensor]:
    """Random numbers for samples of `lengths` tokens, of which about `share` were chosen."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    rewards, values = torch.randn(2, total, generator=generator, dtype=torch.float64)
    return {
        "token_rewards": rewards,
        "values": values,
        "lengths": torch.tensor(lengths),
        "mask": torch.rand(total, generator=generator) < share,
        "bootstrap": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
    }


def emulated(
    warps: ctypes.CDLL, made: dict[str, torch.Tensor], off: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns by way of the warp."""
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), made["lengths"].cumsum(0)])
    rewards, values = made["token_rewards"].contiguous(), made["values"].contiguous()
    advantages, returns = (torch.full_like(values, torch.nan) for _ in range(2))
    tensors = [rewards, values, made["mask"], bounds, made["bootstrap"], advantages, returns]
    warps.gae_warps(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        ctypes.c_double(GAMMA),
        ctypes.c_double(GAMMA * LAM),
        ctypes.c_int64(len(made["lengths"])),
        ctypes.c_int(off),
    )
    return advantages, returns


LENGTHS = st.lists(st.sampled_from([0, 1, 2, 31, 32, 33, 64, 70]), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 2**20))
def test_a_warp_gives_the_bits_of_the_cpu(
    warps: ctypes.CDLL, lengths: list[int], share: float, seed: int
) -> None:
    made = batch(lengths, share, seed)
    expected = gae(**made, gamma=GAMMA, lam=LAM)
    for found, wanted in zip(emulated(warps, made), expected, strict=True):
        assert torch.equal(found, wanted)


def test_listening_to_the_wrong_thread_is_noticed(warps: ctypes.CDLL) -> None:
    """The control of the test above."""
    made = batch([40], 1.0, 1)
    expected, _ = gae(**made, gamma=GAMMA, lam=LAM)
    assert (emulated(warps, made, off=1)[0] - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bounds": torch.tensor([0, 3])}, "do not end"),
        ({"bounds": torch.tensor([0, 9, 4])}, "fall"),
        ({"values": torch.zeros(4)}, "values must be a contiguous Double"),
        ({"mask": torch.ones(3).bool()}, "mask must be a contiguous Bool tensor of 4 entries"),
        ({"bootstrap": torch.zeros(0).double()}, "bootstrap must be"),
    ],
)
def test_what_the_kernel_may_not_believe_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    given_ = {
        "rewards": torch.zeros(4).double(),
        "values": torch.zeros(4).double(),
        "mask": torch.ones(4).bool(),
        "bounds": torch.tensor([0, 4]),
        "bootstrap": torch.zeros(1).double(),
    }
    operators().gae(*given_.values(), 0.9, 0.9)
    given_ |= change
    if "bounds" in change and len(change["bounds"]) == 3:
        given_["bootstrap"] = torch.zeros(2).double()
    with pytest.raises(RuntimeError, match=message):
        operators().gae(*given_.values(), 0.9, 0.9)
