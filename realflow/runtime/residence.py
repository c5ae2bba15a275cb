"""Whether the weights of a holding are on the device, in host memory, or let go."""

from __future__ import annotations

from typing import Literal

import torch

Where = Literal["here", "away", "freed"]


class Residence:
    """The memory of one flat buffer. Every view of it stays valid: the storage below them is emptied
    and filled again. Nobody may touch the values unless `where` is `here`."""

    def __init__(self, storage: torch.Tensor) -> None:
        self.where: Where = "here"
        self._storage = storage
        self._bytes = storage.untyped_storage().nbytes()
        self._host: torch.Tensor | None = None

    def offload(self) -> None:
        """Move the values to host memory and release the device's."""
        if self.where != "here":
            return
        pinned = self._storage.device.type == "cuda"
        if self._host is None:
            self._host = torch.empty(self._storage.shape, dtype=self._storage.dtype, pin_memory=pinned)
        self._host.copy_(self._storage)
        self._release("away")

    def free(self) -> None:
        """Release the memory; the values are lost."""
        if self.where == "here":
            self._release("freed")
        self._host = None

    def restore(self) -> None:
        """Have memory on the device again, with the values that were offloaded; zeros after `free`."""
        if self.where == "here":
            return
        self._storage.untyped_storage().resize_(self._bytes)
        if self.where == "away":
            assert self._host is not None
            self._storage.copy_(self._host)
        else:
            self._storage.zero_()
        if self._storage.device.type == "cpu":
            self._host = None  # on a device the pinned memory is kept: making it takes long
        self.where = "here"

    def _release(self, where: Where) -> None:
        self._storage.untyped_storage().resize_(0)
        self.where = where
