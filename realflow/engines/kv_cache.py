"""Keys and values of the sequences that are being decoded, in slots of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a cache: `layers`, `slots` sequences of at most `length` tokens, heads and head dim.

    Layers are known by their number in the model, of which `first_layer` is the lowest here.
    """

    layers: int
    slots: int
    kv_heads: int
    length: int
    head_dim: int
    first_layer: int = 0

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory of a cache in `dtype`: keys and values of every slot at full length."""
        return 2 * self.layers * self.slots * self.kv_heads * self.length * self.head_dim * dtype.itemsize


class KVCache:
    """One preallocated tensor [layers, 2, slots, kv_heads, length, head_dim] (keys, then values).

    A head's tokens lie together, so that attention reads straight runs of memory; a slice
    `[:slots, :, :length]` is a view. It starts as zeros because entries beyond a sequence's end are
    masked in attention but still multiplied with a weight of zero.
    """

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        sizes = (shape.layers, 2, shape.slots, shape.kv_heads, shape.length, shape.head_dim)
        self._all = torch.zeros(sizes, dtype=dtype, device=device)
        self._flat = [layer.view(-1, shape.head_dim) for layer in self._all.unbind(0)]
        pairs = torch.arange(2, device=device)[:, None] * shape.slots * shape.kv_heads
        self._head_rows = (pairs + torch.arange(shape.kv_heads, device=device)) * shape.length

    def rows(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where the tokens at (slot, position), both [T], are written: int64 [T, 2, kv_heads]."""
        first = slots * (self.shape.kv_heads * self.shape.length) + positions
        return first[:, None, None] + self._head_rows

    def write(self, layer: int, rows: torch.Tensor, pairs: torch.Tensor) -> None:
        """Store keys and values [T, 2, kv_heads, head_dim] at `rows` (see `rows`)."""
        flat = self._flat[layer - self.shape.first_layer]
        flat.index_copy_(0, rows.view(-1), pairs.reshape(-1, self.shape.head_dim))

    def read(self, first: int, slots: int, length: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's keys and values of `slots` slots from `first` on: views [slots, kv_heads, length,
        head_dim]."""
        keys, values = self._all[:, :, first : first + slots, :, :length].unbind(1)
        return dict(enumerate(zip(keys.unbind(0), values.unbind(0), strict=True), self.shape.first_layer))

    def read_slot(self, layer: int, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one slot in one layer: views [kv_heads, length, head_dim]."""
        keys, values = self._all[layer - self.shape.first_layer, :, slot, :, :length].unbind(0)
        return keys, values

    def copy(self, source: int, destination: int, length: int, layer: int | None = None) -> None:
        """Copy the first `length` tokens of a slot to another one, in one layer or in all."""
        part = self._all if layer is None else self._all[layer - self.shape.first_layer][None]
        part[:, :, destination, :, :length].copy_(part[:, :, source, :, :length])
