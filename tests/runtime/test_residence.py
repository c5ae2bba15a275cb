"""Offloading: memory is really let go, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from realflow.models.residence import Residence


class Copies(TorchDispatchMode):
    """Counts the operators that touch a tensor's values: `count`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor, self.count = tensor, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(argument is self.tensor for argument in args)
        return func(*args, **(kwargs or {}))


def buffer() -> tuple[torch.Tensor, torch.Tensor, Residence]:
    storage = torch.randn(1000, dtype=torch.float64)
    view = torch.nn.Parameter(storage[100:400].view(20, 15), requires_grad=False)
    return storage, view, Residence(storage)


def test_offload_lets_go_of_the_memory_and_brings_the_values_back() -> None:
    storage, view, residence = buffer()
    before, kept = storage.clone(), view.clone()
    for _ in range(2):
        residence.offload()
        residence.offload()
        assert storage.untyped_storage().nbytes() == 0
        residence.restore()
        residence.restore()
        assert storage.untyped_storage().nbytes() == 8000
        assert torch.equal(storage, before)
        assert torch.equal(view, kept)
        view.add_(1)
        before, kept = storage.clone(), view.clone()
        assert torch.equal(storage[100:400].view(20, 15), view), "a view still shares the memory"


def test_what_is_freed_is_filled_again() -> None:
    storage, view, residence = buffer()
    residence.free()
    assert storage.untyped_storage().nbytes() == 0
    residence.offload()
    assert residence.where == "freed"
    residence.restore()
    view.fill_(2)
    assert torch.equal(storage[100:400], torch.full((300,), 2.0, dtype=torch.float64))


def test_memory_that_is_about_to_be_overwritten_is_not_written_before() -> None:
    storage, _, residence = buffer()
    residence.free()
    with Copies(storage) as writes:
        residence.restore()
    assert not writes.count


def test_constant_values_are_copied_to_the_host_once() -> None:
    storage = torch.randn(1000)
    for constant, keep, copies in (
        (True, True, [1, 0, 0]),
        (False, True, [1, 1, 1]),
        (True, False, [1, 1, 1]),
    ):
        before, residence = storage.clone(), Residence(storage, constant=constant, keep=keep)
        found = []
        for _ in range(3):
            with Copies(storage) as reads:
                residence.offload()
            assert storage.untyped_storage().nbytes() == 0
            residence.restore()
            found.append(reads.count)
            assert torch.equal(storage, before)
            assert (residence._host is not None) == keep
        assert found == copies


def test_a_tensor_that_shares_its_storage_is_refused() -> None:
    with pytest.raises(AssertionError, match="other users"):
        Residence(torch.randn(10)[:5])
