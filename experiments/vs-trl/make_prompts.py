"""Write `prompts.json`: 64 distinct one-digit sums as chat prompts, the same for both sides.

Run from the repository's root: `.venv/bin/python experiments/vs-trl/make_prompts.py`
"""

from __future__ import annotations

import json
from pathlib import Path

import reasoning_gym

COUNT = 64


def questions(count: int) -> list[str]:
    """The first `count` distinct questions of chain_sum with two one-digit terms, seed 0."""
    data = reasoning_gym.create_dataset(
        "chain_sum", seed=0, size=count * 10, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    distinct = list(dict.fromkeys(entry["question"] for entry in data))
    assert len(distinct) >= count, len(distinct)
    return distinct[:count]


if __name__ == "__main__":
    target = Path(__file__).with_name("prompts.json")
    target.write_text(json.dumps(questions(COUNT), indent=0) + "\n", encoding="utf-8")
    print(f"{COUNT} prompts in {target}")
