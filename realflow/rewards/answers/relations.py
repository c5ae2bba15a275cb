"""Answers with a relation: equations, inequalities, sets of real numbers, "about".

What stands on the sides is compared by `judge`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from realflow.rewards.answers.identity import constant, proportional
from realflow.rewards.answers.normal import squeezed
from realflow.rewards.answers.regions import equal_regions, region
from realflow.rewards.answers.split import split
from realflow.rewards.answers.tokens import TooLarge, Unreadable
from realflow.rewards.answers.tree import Apply, Tree, parse

Judge = Callable[[str, str], bool]

_LETTER = r"(?:[A-Za-z]|\\[a-z]+\s?)(?:_(?:\{[^{}]*\}|\w))?'*"
_NAME = re.compile(
    rf"""^(?:{_LETTER}(?:\^\{{?-1\}}?)?(?:\s?\([^()]*\))? | "[^"]*" | [A-Za-z\ ]+ | \|[^|]*\|
           | \([a-z](?:,\s?[a-z])+\) | m?\s?\\(?:angle|overline|triangle|widehat)\s?\{{?[A-Z]+\}}?
           | [A-Za-z](?:\s?[-+]\s?[A-Za-z])+ | \\(?:sin|cos|tan)\s?(?:[A-Za-z(]|\\[a-z]+)[A-Za-z)]*
           | \\frac\{{d\w*\}}\{{d\w\}})$""",
    re.VERBOSE,
)
_REGION = re.compile(r'[<>|:]|\\(?:le|ge|ne|cup|cap|in|R|setminus)(?![a-z])|[Aa]ll "?real|[Rr]eals')
_TURNED = {">": "<", "\\ge": "\\le"}


def named(text: str) -> tuple[str, str] | None:
    """(name, value) of `x = 3`, of `S = a + b = 3` the last value; of `3 = x` too. Else None."""
    sides, marks = split(text, "=")
    if not marks or not all(sides):
        return None
    if _NAME.match(sides[0]):
        return squeezed(sides[0]), sides[-1]
    return (squeezed(sides[-1]), sides[0]) if _NAME.match(sides[-1]) and len(sides) == 2 else None


def approximate(a: str, t: str, judge: Judge) -> bool | None:
    """Of what is "about" something else, either side may be meant."""
    sides = [split(text, "\\approx")[0] for text in (a, t)]
    if len(sides[0]) == len(sides[1]) == 1:
        return None
    if max(map(len, sides)) > 2:
        return False
    return any(judge(left, right) for left in sides[0] if left for right in sides[1] if right)


def regions(a: str, t: str, judge: Judge) -> bool | None:
    """Sets of real numbers, where at least one is written as more than a pair in brackets."""
    if not (_REGION.search(a) or _REGION.search(t)):
        return None
    try:
        found, expected = region(a), region(t)
    except (Unreadable, TooLarge):
        return None
    return None if found is None or expected is None else equal_regions(found, expected)


def inequalities(a: str, t: str, judge: Judge) -> bool | None:
    """Two inequalities in several letters: one is a positive multiple of the other."""
    parts = [split(text, "<", ">", "\\le", "\\ge", "\\ne") for text in (a, t)]
    if [len(marks) for _, marks in parts] != [1, 1]:
        return None
    try:
        trees = [_difference(sides, turned=marks[0] in _TURNED) for sides, marks in parts]
        sign = proportional(*trees)
    except (Unreadable, TooLarge):
        return None
    kinds = [_TURNED.get(marks[0], marks[0]) for _, marks in parts]
    return kinds[0] == kinds[1] and (sign > 0 or (kinds[0] == "\\ne" and sign != 0))


def _difference(sides: list[str], *, turned: bool = False) -> Tree:
    left, right = (parse(side) for side in sides)
    if turned:
        left, right = right, left
    return Apply("add", (left, Apply("neg", (right,))))


def congruences(a: str, t: str, judge: Judge) -> bool | None:
    """Residues, `x \\equiv 3 \\pmod 4`: of one modulus, apart by a multiple of it; one may leave it out."""
    sides = [split(text, "\\pmod")[0] for text in (a, t)]
    if max(map(len, sides)) == 1:
        return None
    left = [side[0].replace("=", "\\equiv ") for side in sides]
    residues = [split(text, "\\equiv")[0][-1] for text in left]
    moduli = [side[1] for side in sides if len(side) == 2]
    if judge(*residues):
        return len(moduli) == 1 or judge(*moduli)
    try:
        found, expected, modulus = (constant(parse(text)) for text in (*residues, moduli[-1]))
    except (Unreadable, TooLarge):
        return False
    if len(moduli) < 2 or not judge(*moduli) or found is None or expected is None or not modulus:
        return False
    return bool((found - expected) % modulus == 0)


def equations(a: str, t: str, judge: Judge) -> bool | None:
    """Equations: the same name and value, or one a multiple of the other; a name alone may be left out."""
    found, expected = split(a, "=")[0], split(t, "=")[0]
    if len(found) == len(expected) == 1:
        return None
    if not all(found) or not all(expected):
        texts = ["=".join(filter(None, sides)) for sides in (found, expected)]
        return judge(*texts) if all(texts) else False
    names = named(a), named(t)
    if len(expected) == 1:
        return judge(names[0][1] if names[0] else found[-1], t)
    if len(found) == 1:
        return judge(a, names[1][1]) if names[1] else False
    if names[0] and names[1] and names[0][0] == names[1][0]:
        return judge(names[0][1], names[1][1])
    if len(found) != 2 or len(expected) != 2:
        return squeezed(found[0]) == squeezed(expected[0]) and judge(found[-1], expected[-1])
    try:
        return proportional(_difference(found), _difference(expected)) != 0
    except (Unreadable, TooLarge):
        return judge(found[0], expected[0]) and judge(found[1], expected[1])
