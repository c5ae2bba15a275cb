"""The memory that a reallocation needs beyond the two layouts."""

from __future__ import annotations

import torch

from realflow.errors import InputError

BUCKET_BYTES = 64 * 1024 * 1024
ALONE_BYTES = 8 * 1024 * 1024


class Buckets:
    """Two byte buffers, one to send from and one to receive into, kept from one reallocation to the next.

    Each is halved into two slots, so that one is packed or unpacked while the other travels. All ranks
    of a reallocation must use the same sizes: messages are cut to a slot, and pieces of at least
    `alone_bytes` travel alone, without a slot where they lie in one run of memory.
    """

    def __init__(
        self,
        bucket_bytes: int = BUCKET_BYTES,
        device: torch.device | str = "cpu",
        alone_bytes: int = ALONE_BYTES,
    ) -> None:
        if bucket_bytes < 64:
            raise InputError(f"bucket_bytes must be at least 64, not {bucket_bytes}")
        self.slot_bytes = bucket_bytes // 2
        self.alone_bytes = alone_bytes
        self.device = torch.device(device)
        self._slots: dict[str, list[torch.Tensor]] = {"send": [], "receive": []}

    def slots(self, side: str, size: int) -> list[torch.Tensor]:
        """Two uint8 buffers of at least `size` bytes (at most `slot_bytes`)."""
        assert size <= self.slot_bytes, (size, self.slot_bytes)
        held = self._slots[side]
        if not held or held[0].numel() < size:
            self._slots[side] = []  # let go of the old ones before the new ones are made
            del held
            self._slots[side] = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        return self._slots[side]

    @property
    def held_bytes(self) -> int:
        """Bytes held now."""
        return sum(slot.numel() for slots in self._slots.values() for slot in slots)
