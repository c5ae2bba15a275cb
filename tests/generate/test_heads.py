"""Which key and value heads a tensor rank keeps, and where its query heads find them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from realflow.engines.kv_cache import CacheShape, KVCache
from realflow.engines.part import Heads
from realflow.engines.passes import Pass, Prefix
from realflow.layout import cut

SIZE, LENGTH, PROMPT, SLOTS = 4, 9, 5, 2


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_every_query_head_finds_its_key_head(kv_heads: int, group: int, ranks: int) -> None:
    heads = kv_heads * group
    for rank in range(min(ranks, heads)):
        query = cut(heads, min(ranks, heads), rank)
        shared = kv_heads % min(ranks, heads) != 0
        computed = (0, kv_heads) if shared else cut(kv_heads, min(ranks, heads), rank)
        mine = Heads.of(heads, kv_heads, query, computed)
        assert mine.query == query[1] - query[0]
        for local in range(mine.query):
            place = mine.first + local
            kept = place // mine.group
            assert 0 <= kept < mine.cached
            assert computed[0] + mine.kept[0] + kept == (query[0] + local) // group
        used = {head // group for head in range(*query)}
        assert mine.cached == len(used)  # nothing is stored that no query head reads


@given(st.sampled_from([(3, 3, 2), (2, 2, 3), (3, 2, 4), (1, 5, 2), (4, 2, 2)]), st.integers(0, 100))
def test_attention_of_all_ranks_is_that_of_one(sizes: tuple[int, int, int], seed: int) -> None:
    """Slots' rows and a prefix of one pass; the parts of the ranks side by side are the whole."""
    kv_heads, group, ranks = sizes
    heads = kv_heads * group
    generator = torch.Generator().manual_seed(seed)
    rows = SLOTS + PROMPT

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, pairs = random(rows, heads, SIZE), random(rows, 2, kv_heads, SIZE)

    def attend(query_range: tuple[int, int], computed: tuple[int, int]) -> torch.Tensor:
        mine = Heads.of(heads, kv_heads, query_range, computed)
        shape = CacheShape(1, SLOTS, mine.cached, LENGTH, SIZE, first_layer=3)
        cache = KVCache(shape, torch.float64, torch.device("cpu"))
        step = Pass(cache, mine, 0, [1, 2], [1, PROMPT + 1], [Prefix(1, (3,) * PROMPT)])
        part = pairs[:, :, slice(*computed)]
        return step.attend(3, query[:, slice(*query_range)], part, scale=0.5, window=None)

    whole = attend((0, heads), (0, kv_heads))
    shared = kv_heads % ranks != 0
    parts = [
        attend(cut(heads, ranks, rank), (0, kv_heads) if shared else cut(kv_heads, ranks, rank))
        for rank in range(ranks)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)
    for row, head in ((1, 0), (1, heads - 1), (rows - 1, heads - 1)):  # against plain sums
        seen = [*range(SLOTS, rows), 1] if row == 1 else list(range(SLOTS, row + 1))
        keys, values = (pairs[seen, which, head // group] for which in (0, 1))
        expected = (keys @ query[row, head] * 0.5).softmax(0) @ values
        torch.testing.assert_close(whole[row, head], expected, atol=1e-12, rtol=0)
