"""Answers that are one value: a choice's letter, a number in a base, a quantity with unit, an expression."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from realflow.rewards.answers import symbolic
from realflow.rewards.answers.decimals import decimal, stands_for
from realflow.rewards.answers.evaluate import Value
from realflow.rewards.answers.identity import close, constant, identical
from realflow.rewards.answers.tokens import TooLarge, Unreadable
from realflow.rewards.answers.tree import parse
from realflow.rewards.answers.units import Quantity, combined, quantity


class UnreadableTruth(ValueError):
    """What an answer is to be compared with is neither mathematics that can be read, nor words."""


Judge = Callable[[str, str], bool]

_CHOICE = re.compile(
    r"^(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Pp]oint)?\s*(?:\(\s*([A-Ja-j])\s*\)|([A-J])\s*[).:]|([A-J])$)\s*(?!\s|,)(.*)$",
    re.DOTALL,
)
_BASED = re.compile(r'^([0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\s*_\s*\{?\s*"?([a-z0-9]+)"?\s*\}?$')


def choices(a: str, t: str, judge: Judge) -> bool | None:
    """A letter of a list of choices, as `C`, `(C)`, `C.` or with what it stands for: `(C) 12`."""
    expected = _CHOICE.match(t.replace('"', "").strip())
    found = _CHOICE.match(a.replace('"', "").strip())
    if expected is None:
        named = found is not None and not found[3] and found[4].strip()
        return True if named and judge(named, t) else None
    if found is not None:
        return _letter(found) == _letter(expected)
    value = expected[4].strip()
    return judge(a, value) if value else None


def _letter(match: re.Match[str]) -> str:
    return (match[1] or match[2] or match[3]).upper()


def based(a: str, t: str, judge: Judge) -> bool | None:
    """Numbers with the base that they are written in; one may leave it out."""
    found, expected = _BASED.match(a), _BASED.match(t)
    if expected is None and found is None:
        return None
    digits = [match[1] if match else text.strip() for match, text in ((found, a), (expected, t))]
    bases = {match[2] for match in (found, expected) if match}
    return digits[0].upper().lstrip("0") == digits[1].upper().lstrip("0") and len(bases) == 1


def combinations(a: str, t: str, judge: Judge) -> bool | None:
    """Quantities in several units, `1 hour 20 minutes`."""
    texts = [combined(text) for text in (a, t)]
    return judge(texts[0] or a, texts[1] or t) if any(texts) else None


_CLOCK = re.compile(r"^(\d{1,2})(?:\s*:\s*(\d{2}))?\s*([ap]m)?$")


def clocks(a: str, t: str, judge: Judge) -> bool | None:
    """Times of day with am or pm, which one of the two may leave out."""
    found, expected = _CLOCK.match(a), _CLOCK.match(t)
    if expected is None or not (expected[3] or (found and found[3])):
        return None
    if found is None:
        return False
    minutes = [(int(match[1]), int(match[2] or 0)) for match in (found, expected)]
    return minutes[0] == minutes[1] and (found[3] or expected[3]) == (expected[3] or found[3])


def quantities(a: str, t: str, judge: Judge) -> bool | None:
    """Values with units, currencies and per cent."""
    found, expected = quantity(a), quantity(t)
    if found == Quantity(a) and expected == Quantity(t):
        return None
    if not found.value or not expected.value:
        return False
    if found.percent != expected.percent:
        return _percent(found, expected, judge)
    sure = found.sure and expected.sure
    try:
        if _equal(found, expected, judge):
            return True
    except UnreadableTruth:  # it may be readable with what was taken for a unit
        if sure:
            raise
    return False if sure else None


def _equal(found: Quantity, expected: Quantity, judge: Judge) -> bool:
    left, right = found.unit, expected.unit
    if left is None or right is None or left.dimension is None or right.dimension is None:
        return judge(found.value, expected.value) or _angles(found, expected, judge)
    if left.dimension != right.dimension:
        return False
    if left.factor == right.factor:
        return judge(found.value, expected.value)
    return _scaled(found.value, left.factor, expected.value, right.factor)


def _percent(found: Quantity, expected: Quantity, judge: Judge) -> bool:
    """One is per cent: of equal value, or the sign was left out (of a number that is no share)."""
    factors = [Fraction(1, 100) if one.percent else Fraction(1) for one in (found, expected)]
    if _scaled(found.value, factors[0], expected.value, factors[1]):
        return True
    value = _constant(expected.value)
    return value is not None and bool(abs(value) >= 1) and judge(found.value, expected.value)


def _angles(found: Quantity, expected: Quantity, judge: Judge) -> bool:
    """Degrees on one side, on the other a multiple of pi without a unit."""
    for one, other in ((found, expected), (expected, found)):
        angle = one.unit is not None and one.unit.dimension == (("angle", 1),)
        if angle and (other.unit is None or other.unit.dimension is None) and "\\pi" in other.value:
            return judge(other.value, rf"({one.value})*\pi/180")
    return False


def _scaled(a: str, factor: Fraction, t: str, other: Fraction) -> bool:
    left, right = _constant(a), _constant(t)
    return left is not None and right is not None and close(left * factor, right * other)


def _constant(text: str) -> Value | None:
    try:
        return constant(parse(text))
    except (Unreadable, TooLarge):
        return None


def expressions(a: str, t: str) -> bool:
    """Two expressions by their values; by math-verify where one cannot be read."""
    try:
        found, expected = parse(a), parse(t)
        if identical(found, expected):
            return True
        left, right = constant(found), constant(expected)
        if left is not None and right is not None and stands_for(left, decimal(a), right, decimal(t)):
            return True
        return any(_reads(a, t, *way) for way in ((True, False), (False, True), (True, True)))
    except TooLarge:
        return False
    except Unreadable:
        verdict = symbolic.equal(a, t)
    if verdict is None and not _readable(t):
        raise UnreadableTruth(f"the truth {t[:200]!r} cannot be read, and is not written as the answer is")
    return bool(verdict)


def _readable(text: str) -> bool:
    try:
        parse(text)
    except (Unreadable, TooLarge):
        return False
    return True


def _reads(a: str, t: str, tight_answer: bool, tight_truth: bool) -> bool:
    """Another reading of a slash with letters after it: `1/2x` as 1/(2x)."""
    if not ((tight_answer and "/" in a) or (tight_truth and "/" in t)):
        return False
    return bool(identical(parse(a, tight=tight_answer), parse(t, tight=tight_truth)))
