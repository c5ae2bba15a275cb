"""Decimals beside exact values: when what is written with a point stands for what it is near to.

An exact truth (a fraction, a root, an integer) wants an exact answer: 0.333 is not 1/3, and 0.5 is 1/2.
Two things are let through. A truth of at least three digits, written with a point, is taken as rounded:
what rounds to it is right (pi for 3.14), but not another decimal that is only a digit longer. And a
decimal of six places or more that is right in all of them stands for a number that no decimal is, as
math-verify has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from realflow.rewards.answers.evaluate import Value, inexact

PLACES = 6
"""Places after the point from which on a decimal stands for a number that has no end."""

_LITERAL = re.compile(
    r"^([-+]?)\s*(\d*)(?:\.(\d*))?(?:[eE]([-+]?\d{1,3})|\s*\*\s*10\s*\^\s*(?:\{\s*(-?\d{1,3})\s*\}|(-?\d{1,3})))?$"
)


@dataclass(frozen=True)
class Decimal:
    """A decimal as it was written: its value, that of one in its last place, its digits and its places."""

    value: Fraction
    last: Fraction
    digits: int
    places: int
    pointed: bool


def decimal(text: str) -> Decimal | None:
    """A number written in digits, with a power of ten or without; else None."""
    match = _LITERAL.match(text.strip())
    if match is None or not (match[2] or match[3]) or len(text) > 200:
        return None
    sign, whole, part = match[1], match[2] or "", match[3] or ""
    power = int(match[4] or match[5] or match[6] or 0)
    last = Fraction(10) ** (power - len(part))
    value = int(whole + part) * last * (-1 if sign == "-" else 1)
    digits = len((whole + part).lstrip("0"))
    return Decimal(value, last, digits, len(part) - min(power, 0), match[3] is not None)


def endless(number: Value) -> bool:
    """Whether no decimal is exactly this number."""
    if not isinstance(number, Fraction):
        return True
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest != 1


def stands_for(answer: Value, written: Decimal | None, truth: Value, expected: Decimal | None) -> bool:
    """Whether an answer that is not equal to the truth stands for it; each with how it was written."""
    exact = isinstance(answer, Fraction) and isinstance(truth, Fraction)
    distance = inexact(abs(answer - truth) if exact else abs(inexact(answer) - inexact(truth)))
    if expected is not None and written is not None and expected.pointed:
        long = min(expected.digits, written.digits) >= PLACES
        if long and distance <= inexact(Fraction(1, 10**PLACES)) * abs(inexact(truth)):
            return True
    if expected is not None:
        if not expected.pointed or expected.digits < 3:
            return False
        if written is not None and written.last * 100 > expected.last:
            return False
        if written is None and not endless(answer):
            return False
        return bool(distance <= inexact(expected.last) / 2)
    if written is None or written.places < PLACES or written.digits < PLACES - 1:
        return False
    return endless(truth) and bool(distance <= inexact(written.last))
