"""The memory that a reallocation needs beyond the two layouts."""

from __future__ import annotations

import mmap
import os

import torch

from realflow.errors import InputError, RunError
from realflow.realloc.messages import ALONE_BYTES, BUCKET_BYTES
from realflow.realloc.shared import NOWHERE, Home, Segment, attach, machine_of


class Buckets:
    """Two byte buffers, one to send from and one to receive into, kept from one reallocation to the next.

    Each is halved into two slots, so that one is packed or unpacked while the other travels. All ranks
    of a reallocation must use the same sizes: messages are cut to a slot, and pieces of at least
    `alone_bytes` travel alone, without a slot where they lie in one run of memory.

    Between ranks of one machine whose tensors are on the CPU the bucket to send from lies in memory that
    they share, and nothing is needed to receive into. With `shared=False` this rank shares none.
    """

    def __init__(
        self,
        bucket_bytes: int = BUCKET_BYTES,
        device: torch.device | str = "cpu",
        alone_bytes: int = ALONE_BYTES,
        shared: bool = True,
    ) -> None:
        if bucket_bytes < 64:
            raise InputError(f"bucket_bytes must be at least 64, not {bucket_bytes}")
        self.slot_bytes = bucket_bytes // 2
        self.alone_bytes = alone_bytes
        self.device = torch.device(device)
        self.shared = shared
        self._slots: dict[str, list[torch.Tensor]] = {"send": [], "receive": []}
        self._segment: Segment | None = None
        self._others: dict[int, tuple[Home, torch.Tensor]] = {}

    def slots(self, side: str, size: int) -> list[torch.Tensor]:
        """Two uint8 buffers of at least `size` bytes (at most `slot_bytes`).

        Raises RunError in a child of the process that shares them: it would write to its parent's.
        """
        assert size <= self.slot_bytes, (size, self.slot_bytes)
        self._refuse_a_child()
        held = self._slots[side]
        if not held or held[0].numel() < size:
            self._slots[side] = []  # let go of the old ones before the new ones are made
            del held
            self._slots[side] = [self._slot(side, size, index) for index in range(2)]
        return self._slots[side]

    def home(self) -> Home:
        """Share the bucket to send from, if it is to be, and say where. Raises OSError where that fails, and
        RunError as `slots` does."""
        self._refuse_a_child()
        if not self.shared or (machine := machine_of(self.device)) == NOWHERE:
            return Home()
        if self._segment is None:
            self._segment = Segment(2 * self._stride, machine)
            self._slots["send"] = []
        return self._segment.home

    def of(self, rank: int, home: Home) -> torch.Tensor:
        """The bucket that another rank shares, mapped once. Raises OSError where it cannot be had."""
        known = self._others.get(rank)
        if known is None or known[0] != home:
            known = self._others[rank] = home, attach(home)
        return known[1]

    @property
    def held_bytes(self) -> int:
        """Bytes held now, without what other ranks share with this one."""
        return sum(slot.numel() for slots in self._slots.values() for slot in slots)

    @property
    def _stride(self) -> int:
        """From one shared slot to the next: whole pages, of which only those written to exist."""
        return -(-self.slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE

    def _refuse_a_child(self) -> None:
        if self._segment is not None and self._segment.home.process != os.getpid():
            raise RunError(
                f"realloc: process {os.getpid()} has the buckets of process {self._segment.home.process}, of "
                "which it is a fork, and which may be in use there; make new Buckets after a fork"
            )

    def _slot(self, side: str, size: int, index: int) -> torch.Tensor:
        if side == "send" and self._segment is not None:
            first = index * self._stride
            return self._segment.memory[first : first + size]
        return torch.empty(size, dtype=torch.uint8, device=self.device)
