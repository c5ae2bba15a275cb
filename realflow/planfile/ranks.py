"""Sets of ranks as people write them: `0-3,6`."""

from __future__ import annotations

import re
from collections.abc import Sequence

LIMIT = 1 << 17
"""More devices than any cluster has; bounds what a short text can make."""
_RANKS = re.compile(r"\d{1,7}(-\d{1,7})?(,\d{1,7}(-\d{1,7})?)*")


def parse_ranks(text: str) -> tuple[int, ...] | None:
    """Ranks in the order written: `0-2,5` is (0, 1, 2, 5). None where the text is none of that."""
    if not _RANKS.fullmatch(text):
        return None
    ranks: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high < low or high >= LIMIT or len(ranks) + high - low >= LIMIT:
            return None
        ranks.extend(range(low, high + 1))
    return tuple(ranks)


def format_ranks(ranks: Sequence[int]) -> str:
    """The text that `parse_ranks` reads as these ranks, in this order: rising runs as `first-last`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ",".join("-".join(map(str, run)) for run in runs)
