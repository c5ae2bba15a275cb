"""Data that needs no download: pairs of answers to sums of two one-digit numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from realflow.errors import InputError

_OFF = (1, -1, 2, -2, 10, -10, 3, -3)
"""How far wrong answers are from the right one."""


def sum_pairs(*, wrong: int = 4, test: float = 0.3, use: str = "train") -> list[dict[str, str]]:
    """Rows of `question`, `chosen` (the right answer) and `rejected` (a wrong one): the questions that
    reasoning-gym's `chain_sum` asks of two one-digit numbers, each with `wrong` wrong answers in turn.

    A share `test` of the questions is held out, `use` is `train` or `test`: the same questions as with
    `unique: question` and `split: {test: .., use: ..}` over all of them, so that graphs which read those
    and graphs which read pairs hold out the same. Raises InputError for options that make no sense.
    """
    if not 1 <= wrong <= len(_OFF):
        raise InputError(f"sum_pairs: wrong must be from 1 to {len(_OFF)}, not {wrong}")
    if not 0 <= test < 1 or use not in ("train", "test"):
        raise InputError(
            f"sum_pairs: found test {test} and use {use!r}; expected 0 <= test < 1, train or test"
        )
    answers = {
        f"State the final answer to the following arithmetic problem: {a} {sign} {b} =": total
        for a in range(10)
        for b in range(10)
        for sign, total in (("+", a + b), ("-", a - b))
    }
    held_out = _held_out(list(answers), test)
    return [
        {"question": question, "chosen": str(answer), "rejected": str(answer + off)}
        for off in _OFF[:wrong]
        for question, answer in answers.items()
        if (question in held_out) == (use == "test")
    ]


def _held_out(texts: Sequence[str], share: float) -> set[str]:
    """The texts that are held out: those first in the order of their hashes (as `data.source` has it)."""
    order = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest())
    return set(order[: round(share * len(order))])
