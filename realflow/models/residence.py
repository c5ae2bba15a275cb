"""Whether values are on the device, in host memory, or let go."""

from __future__ import annotations

from typing import Literal

import torch

Where = Literal["here", "away", "freed"]


class Residence:
    """The memory of a tensor that has its storage to itself, such as a flat buffer.

    Every view of it stays valid: the storage below them is emptied and filled again. Nobody may touch
    the values unless `where` is `here`. The host's memory is kept (`keep`) while the values are on the
    device, by default where it is pinned, which takes long to make; `constant` values are copied to
    memory that is kept only once.
    """

    def __init__(self, tensor: torch.Tensor, *, constant: bool = False, keep: bool | None = None) -> None:
        self._bytes = tensor.untyped_storage().nbytes()
        assert self._bytes == tensor.numel() * tensor.element_size(), "the storage has other users"
        self.where: Where = "here"
        self._tensor, self._constant = tensor, constant
        self._keep = tensor.is_cuda if keep is None else keep
        self._host: torch.Tensor | None = None

    def offload(self) -> None:
        """Move the values to host memory and release the device's."""
        if self.where != "here":
            return
        if self._host is None:
            shape, dtype = self._tensor.shape, self._tensor.dtype
            self._host = torch.empty(shape, dtype=dtype, pin_memory=self._tensor.is_cuda)
            self._host.copy_(self._tensor)
        elif not self._constant:
            self._host.copy_(self._tensor)
        self._release("away")

    def free(self) -> None:
        """Release the memory; the values are lost."""
        self._host = None
        self._release("freed")

    def restore(self) -> None:
        """Have memory on the device again, with the values that were offloaded; after `free` with any
        values, for whoever overwrites them."""
        if self.where == "here":
            return
        self._tensor.untyped_storage().resize_(self._bytes)
        if self.where == "away":
            assert self._host is not None
            self._tensor.copy_(self._host)
            if not self._keep:
                self._host = None
        self.where = "here"

    def _release(self, where: Where) -> None:
        self._tensor.untyped_storage().resize_(0)
        self.where = where
