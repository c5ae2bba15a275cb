r"""Whether two answers are the same.

Each kind of answer has a function of two normal texts that gives True or False where they are of that kind,
else None; they are asked in turn, and what has parts compares these by the same rules. What the parser of
this room reads is decided by values (`identity.py`), the rest by math-verify (`symbolic.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from realflow.rewards.answers import lists, relations, values
from realflow.rewards.answers.decimals import decimal, stands_for
from realflow.rewards.answers.normal import LONGEST, normal, squeezed
from realflow.rewards.answers.split import items
from realflow.rewards.answers.values import UnreadableTruth
from realflow.rewards.answers.words import equal_words

DEEPEST = 12
_THOUSANDS = re.compile(
    r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.])\d{1,3}(?: \d{3})+(?! ?\d)"
)  # fmt: skip


def same(answer: str, truth: str) -> bool:
    """Whether an answer is the truth. Odd answers may take for ever: what `quick` leaves belongs in a worker.

    A decimal is a fraction only where it is exact: `0.333` is not `1/3` (`decimals.py` says what is near
    enough). Units count where both have one. Text that is no mathematics is compared as words. A truth
    that cannot be read is no answer but one that is written in the same way.
    """
    try:
        return judged(answer, truth)
    except UnreadableTruth:
        return False


def judged(answer: str, truth: str) -> bool:
    """What `same` says; raises UnreadableTruth where the truth cannot be read and the texts differ."""
    found = quick(answer, truth)
    if found is not None:
        return found
    try:
        return _any_reading(normal(answer), normal(truth))
    except RecursionError:  # nested deeper than any answer is
        return False


def quick(answer: str, truth: str) -> bool | None:
    """What needs no mathematics: the same text, two plain numbers, text that is too long. Else None."""
    if max(len(answer), len(truth)) > LONGEST:
        return " ".join(answer.split()) == " ".join(truth.split())
    a, t = normal(answer), normal(truth)
    if not a or not t:
        return False
    if squeezed(a) == squeezed(t):
        return True
    number, expected = decimal(_joined(a)), decimal(_joined(t))
    if number is None or expected is None:
        return None
    if number.value == expected.value or stands_for(number.value, number, expected.value, expected):
        return True
    return None if "," in a + t else False


def _any_reading(answer: str, truth: str) -> bool:
    """Any reading of one against any reading of the other: `1,234` may be a number or a list."""
    if any(_by_kind(found, expected) for expected in _readings(truth) for found in _readings(answer)):
        return True
    if re.fullmatch(r"-?\d+,\d+", answer) and items(truth) is None:
        return _by_kind(answer.replace(",", "."), truth)  # a decimal comma
    return False


def _joined(text: str) -> str:
    return _THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text)


def _readings(text: str) -> Sequence[str]:
    joined = _joined(text)
    return (text,) if joined == text else (joined, text)


def _by_kind(a: str, t: str, depth: int = 0) -> bool:
    """By the first kind that the two are of. Parts of parts are compared so far down, and no further."""
    if squeezed(a) == squeezed(t):
        return True
    if depth > DEEPEST:
        return False
    judge = partial(_by_kind, depth=depth + 1)
    for kind in _KINDS:
        verdict = kind(a, t, judge)
        if verdict is not None:
            return verdict
    return values.expressions(a, t)


_KINDS: tuple[Callable[[str, str, Callable[[str, str], bool]], bool | None], ...] = (
    values.choices,
    lambda a, t, _: equal_words(a, t),
    values.based,
    relations.approximate,
    relations.congruences,
    values.combinations,
    values.clocks,
    lists.matrices,
    relations.regions,
    lists.lists,
    relations.inequalities,
    relations.equations,
    lists.ratios,
    values.quantities,
)
