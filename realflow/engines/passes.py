"""What one forward pass of running and newly admitted sequences is made of, and its attention.

All tokens of a pass are packed in one dim: first one row for each of B slots (the newest token of
the sequence in that slot), then the prefixes that enter the cache in this pass. A sequence that is
admitted is therefore nothing special: its prompt without the last token is prefilled into its slot,
and the last token is the slot's row. Keys and values are written before attention reads them, so
both happen in the same pass, and prompts share weights' reads with decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from realflow.engines.kv_cache import KVCache
from realflow.engines.part import Heads


@dataclass(frozen=True)
class Prefix:
    """`tokens` to prefill in `slot` from position `start` on (what lies before is there already).

    `copies` are (slot, length) that then get the first tokens of this slot: whole prefixes of
    other samples, or the begin of a later `Prefix` of this pass.
    """

    slot: int
    tokens: tuple[int, ...]
    start: int = 0
    copies: tuple[tuple[int, int], ...] = ()


class Pass:
    """What one forward pass needs to know; T = B + the tokens of all prefixes.

    `tokens`, `positions` int64 [T]; `newest` and `lengths` give, for the B slots from `first` on,
    the newest token and the number of tokens including it.
    """

    def __init__(
        self,
        cache: KVCache,
        heads: Heads,
        first: int,
        newest: Sequence[int],
        lengths: Sequence[int],
        prefixes: Sequence[Prefix],
    ) -> None:
        self.cache, self.heads, self.first = cache, heads, first
        self.slots = len(newest)
        self.prefixes = prefixes
        self.longest = max(lengths)
        device = cache.device
        tokens, positions = list(newest), [n - 1 for n in lengths]
        slots = list(range(first, first + len(newest)))
        for prefix in prefixes:
            tokens.extend(prefix.tokens)
            positions.extend(range(prefix.start, prefix.start + len(prefix.tokens)))
            slots.extend([prefix.slot] * len(prefix.tokens))
        self.tokens = torch.tensor(tokens, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.lengths = torch.tensor(list(lengths), device=device)
        self._shortest = min(lengths)
        self._begin(torch.tensor(slots, device=device), self.positions)

    def _begin(self, slots: torch.Tensor, places: torch.Tensor) -> None:
        """Where keys and values of the rows, at (slot, place), are written, and what is read."""
        self.layers_seen = 0
        self._rows = self.cache.rows(slots, places)
        self._views = self.cache.read(self.first, self.slots, self.longest)
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def attend(
        self, layer: int, query: torch.Tensor, pairs: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of one layer (its number in the model), keys and values of the pass being stored first.

        `query` is [T, query heads, D], `pairs` (keys, values) [T, 2, computed kv heads, D]; returns
        [T, query heads, D].
        """
        heads = self.heads
        if heads.computed != heads.cached:
            pairs = pairs[:, :, heads.kept[0] : heads.kept[1]]
        self.cache.write(layer, self._rows, pairs)
        prefilled = []
        start = self.slots
        for prefix in self.prefixes:
            stop = start + len(prefix.tokens)
            keys, values = self.cache.read_slot(layer, prefix.slot, prefix.start + len(prefix.tokens))
            prefilled.append(_attend_causally(query[start:stop], keys, values, heads, scale, window))
            for slot, length in prefix.copies:
                self.cache.copy(prefix.slot, slot, length, layer)
            start = stop
        attended = self._attend_slots(layer, query[: self.slots], scale, window)
        self.layers_seen += 1
        return torch.cat([attended, *prefilled]) if prefilled else attended

    def _attend_slots(
        self, layer: int, query: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of the slots' rows [B, query heads, D]."""
        heads = self.heads
        if not heads.fill_grid:
            query = F.pad(query, (0, 0, heads.first, heads.cached * heads.group - heads.first - heads.query))
        keys, values = self._views[layer]
        # The query heads of one key/value head are taken as rows, so that nothing is repeated.
        grouped = query.unflatten(1, (heads.cached, heads.group))
        attended = _attend_to_cache(grouped, keys, values, self._mask(window), scale).flatten(1, 2)
        return attended if heads.fill_grid else attended[:, heads.first : heads.first + heads.query]

    def _mask(self, window: int | None) -> torch.Tensor | None:
        """Additive mask [B, 1, 1, longest], None where every slot sees every position."""
        if window not in self._masks:
            mask = None
            if self._shortest < self.longest or (window is not None and window < self.longest):
                places = torch.arange(self.longest, device=self.lengths.device)
                hidden = places >= self.lengths[:, None]
                if window is not None:
                    hidden |= places < self.lengths[:, None] - window
                mask = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=places.device)
                mask = mask.masked_fill_(hidden, -math.inf)[:, None, None]
            self._masks[window] = mask
        return self._masks[window]


def _attend_to_cache(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of each slot's newest token: query [B, kv_heads, groups, D], keys [B, kv_heads, L, D]."""
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    # For so few rows torch's CPU kernel takes half as long again as these products, which round in
    # the same places: scores in float32, weights in bfloat16.
    scores = torch.matmul(query.float().mul_(scale), keys.float().transpose(-1, -2))
    if mask is not None:
        scores.add_(mask)
    return torch.matmul(scores.softmax(-1).to(query.dtype), values)


def _attend_causally(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: Heads,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Attention of one sequence's last m of n tokens: query [m, heads, D], keys [kv_heads, n, D]."""
    m, n = len(query), keys.shape[1]
    mask = None
    if m < n or (window is not None and window < n):
        distance = torch.arange(n - m, n, device=query.device)[:, None] - torch.arange(n, device=query.device)
        mask = (distance >= 0) & (distance < (n if window is None else window))
    mine = slice(heads.first, heads.first + heads.query)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys.repeat_interleave(heads.group, 0)[None, mine],
        values.repeat_interleave(heads.group, 0)[None, mine],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[0].transpose(0, 1)
