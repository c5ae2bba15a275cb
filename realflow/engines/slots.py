"""Which sample is in which slot of the KV cache, and what of it the cache holds already.

The slots are divided into groups that take turns (one group for each pipeline stage, so that all
stages can work at once). The queue is common, and so is what slots hold: a group copies what another
one has prefilled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from realflow.engines.kv_cache import KVCache
from realflow.engines.passes import Prefix
from realflow.engines.samples import Sample

_WORTH_COPYING = 8  # tokens


class Slots:
    """The queue and the slots. A prompt's tokens but the last are its prefix."""

    def __init__(self, count: int, groups: int = 1) -> None:
        self.queue: deque[Sample] = deque()
        ends = np.cumsum([_part(count, groups, index) for index in range(groups)]).tolist()
        self.groups = tuple(range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True))
        self.slots: list[Sample | None] = [None] * count
        # Row by row, the tokens whose keys and values a slot holds; -1 after their end.
        self._prefixes = np.full((count, 64), -1, dtype=np.int64)

    @property
    def running(self) -> list[Sample]:
        """The samples in slots, in order of slot."""
        return [sample for sample in self.slots if sample is not None]

    def running_in(self, group: int) -> list[Sample]:
        """The samples in the slots of one group, in order of slot."""
        return [sample for slot in self.groups[group] if (sample := self.slots[slot]) is not None]

    def forget_prefixes(self) -> None:
        """Copy nothing from the cache any more: the weights or the cache have changed."""
        self._prefixes.fill(-1)

    def remove(self, ids: set[int] | None) -> list[Sample]:
        """Take samples (all, for None) out of slots and queue."""
        out = [s for s in (*self.running, *self.queue) if ids is None or s.id in ids]
        gone = {sample.id for sample in out}
        self.slots = [None if s is None or s.id in gone else s for s in self.slots]
        self.queue = deque(sample for sample in self.queue if sample.id not in gone)
        return out

    def admit(self, cache: KVCache, budget: int, group: int = 0) -> tuple[list[Sample], list[Prefix]]:
        """Move queued samples into free slots of a group, lowest first, up to the group's fair part of
        all samples.

        Returns them and what the pass has to prefill: at most `budget` tokens, but always one
        prompt. Where a slot holds the keys and values of the same prefix, or of one that begins
        alike (samples of one prompt, the common begin of a chat format), they are copied: now, or
        by the pass where it has yet to compute them.
        """
        fresh: dict[int, Prefix] = {}
        origin: dict[int, int] = {}  # slot -> the fresh slot that the pass copies all its tokens from
        admitted: list[Sample] = []
        for slot in self._free(group):
            tokens = self.queue[0].prompt.tokens[:-1]
            prefix = np.array(tokens, dtype=np.int64)
            source, common = self._holder(prefix, slot)
            rest = tokens[common:]
            if rest and fresh and len(rest) > budget:
                break
            source = origin.get(source, source)
            if source in fresh and common:
                held = fresh[source]
                fresh[source] = replace(held, copies=(*held.copies, (slot, common)))
                if not rest:
                    origin[slot] = source
            elif source != slot and common:
                cache.copy(source, slot, common)
            if rest:
                fresh[slot] = Prefix(slot, rest, common)
                budget -= len(rest)
            self._prefixes[slot] = -1
            self._prefixes[slot, : len(prefix)] = prefix
            sample = self.queue.popleft()
            self.slots[slot] = sample
            admitted.append(sample)
        return admitted, list(fresh.values())

    def _free(self, group: int) -> list[int]:
        """The slots of a group that queued samples go to."""
        fair = _part(len(self.queue) + len(self.running), len(self.groups), group)
        room = min(len(self.queue), max(0, fair - len(self.running_in(group))))
        return [slot for slot in self.groups[group] if self.slots[slot] is None][:room]

    def _holder(self, prefix: np.ndarray, slot: int) -> tuple[int, int]:
        """The slot that holds the most of a prefix from its begin, best `slot` itself, and how many tokens.

        Fewer tokens than `_WORTH_COPYING` count as none unless they are the whole prefix.
        """
        size = len(prefix)
        if (width := self._prefixes.shape[1]) <= size:  # a column of -1 remains, wherever a prefix ends
            room = ((0, 0), (0, max(width, size + 1 - width)))
            self._prefixes = np.pad(self._prefixes, room, constant_values=-1)
        differs = np.ones((len(self.slots), size + 1), dtype=bool)
        np.not_equal(self._prefixes[:, :size], prefix, out=differs[:, :size])
        common = differs.argmax(1)
        best = slot if common[slot] == common.max() else int(common.argmax())
        most = int(common[best])
        return (best, most) if most >= _WORTH_COPYING or most == size else (slot, 0)

    def close_gaps(self, cache: KVCache, group: int = 0) -> None:
        """Make the running samples of a group occupy its lowest slots, so that a pass reads one slice of
        the cache.

        Needed only when free slots could not be filled; those just admitted lie lowest and stay.
        """
        low, high = self.groups[group][0], self.groups[group][-1]
        while True:
            while low < high and self.slots[low] is not None:
                low += 1
            while low < high and self.slots[high] is None:
                high -= 1
            if low >= high:
                return
            moved = self.slots[high]
            assert moved is not None and moved.response, "a sample that was just admitted is moved"
            cache.copy(high, low, moved.length - 1)
            self.slots[low], self.slots[high] = moved, None
            self._prefixes[low] = self._prefixes[high]


def _part(total: int, parts: int, index: int) -> int:
    """The size of one of `parts` nearly equal parts. It never falls as `total` grows, so that a group's
    fair part of few samples fits into its part of the slots."""
    return total // parts + (index >= parts - total % parts)
