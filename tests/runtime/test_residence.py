"""Offloading: memory is really let go, and nothing changes."""

from __future__ import annotations

import torch

from realflow.runtime.residence import Residence


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


def test_what_is_freed_is_zero_until_it_is_filled() -> None:
    storage, view, residence = buffer()
    residence.free()
    assert storage.untyped_storage().nbytes() == 0
    residence.offload()
    assert residence.where == "freed"
    residence.restore()
    assert not storage.any()
    view.fill_(2)
    assert storage.sum() == 600
