"""Small files of the shapes that problems come in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

AIME = [
    {"id": 60 + i, "problem": f"Find the remainder of ${i}^2$ divided by 7.", "answer": str(i * i % 7)}
    for i in range(5)
]
MATH = [
    {"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."},
    {"problem": "Simplify $2/4$.", "level": "Level 2", "type": "Algebra", "solution": r"$\boxed{\frac12}$"},
    {"problem": "Count the $3$ signs.", "level": "Level 1", "type": "Counting", "solution": r"\boxed{3}"},
]
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{i}",
        "prompt": f'def add_{i}(a: int, b: int) -> int:\n    """Add {{a}} and b."""\n',
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "entry_point": f"add_{i}",
    }
    for i in range(3)
]
MIXED = [
    {"question": f"What is {i} + 1?", "answer": i + 1, "source": "odd" if i % 2 else "even"} for i in range(6)
]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
