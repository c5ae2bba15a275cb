r"""Answers with several parts: matrices, tuples, sets, lists, ratios. Parts are compared by `judge`.

Order counts in `( )` and between square brackets, not in `\{ \}` or a list without brackets; a list without
brackets may stand for a tuple or for a set. `\pm` makes two items of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from realflow.rewards.answers.evaluate import Value
from realflow.rewards.answers.identity import close, constant
from realflow.rewards.answers.normal import squeezed
from realflow.rewards.answers.relations import named
from realflow.rewards.answers.split import Items, Matrix, items, matrix, split
from realflow.rewards.answers.tokens import TooLarge, Unreadable
from realflow.rewards.answers.tree import parse

Judge = Callable[[str, str], bool]
MOST_ITEMS = 64
_SIGNS = re.compile(r"\\(?:pm|mp)(?![a-z])")
_UPPER, _LOWER = {"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"}


def matrices(a: str, t: str, judge: Judge) -> bool | None:
    """Matrices entry by entry; a single row or column is a tuple where the other is one."""
    found, expected = matrix(a), matrix(t)
    if found is None and expected is None:
        return None
    if found is not None and expected is not None:
        shapes = [(len(one.rows), len(one.rows[0]), one.bars) for one in (found, expected)]
        return shapes[0] == shapes[1] and _all(_flat(found), _flat(expected), judge)
    one, other = (found, items(t)) if found is not None else (expected, items(a))
    assert one is not None
    if other is None:
        return None if "=" in a + t else False
    if other.left == "{" or min(len(one.rows), len(one.rows[0])) > 1:
        return False
    pair = (_flat(one), other.parts)
    return _all(*pair, judge) if found is not None else _all(*pair[::-1], judge)


def _flat(of: Matrix) -> tuple[str, ...]:
    return tuple(cell for row in of.rows for cell in row)


def _all(found: Sequence[str], expected: Sequence[str], judge: Judge) -> bool:
    return len(found) == len(expected) and all(map(judge, found, expected))


def lists(a: str, t: str, judge: Judge) -> bool | None:
    """Tuples, sets and lists."""
    found, expected = _listed(a), _listed(t)
    if found is None and expected is None:
        return None
    if found is None or expected is None:
        one, other = (found, t) if found is not None else (expected, a)
        assert one is not None
        if len(one.parts) == 1 and one.left in ("{", ""):
            return judge(one.parts[0], other) if found is not None else judge(other, one.parts[0])
        if found is one and one.left == "" and len(one.parts) == 2 and judge(*one.parts):
            return judge(one.parts[0], other)  # said twice: 1/2, or 0.5
        return None if "=" in other else False
    return _equal(found, expected, judge)


def _listed(text: str) -> Items | None:
    """A list; what has a sign of both kinds is two items, and `x = 1, 2` are values of one name."""
    text = re.sub(r"^(?:[A-Za-z]|\\[a-z]+)\s*\\in(?![a-z])\s*", "", text)
    text = re.sub(r"^\([a-z](?:,\s?[a-z])+\)\s*=\s*(?=\()", "", text)
    found = items(text)
    if found is None:
        if not _has_signs(text):
            return None
        found = Items("", "", (text,))
    parts = found.parts
    if found.left in ("", "{"):
        parts = tuple(one for part in parts for one in _signs(part))
    names = [named(part) for part in parts]
    if len(parts) > 1 and names[0] is not None and not any(names[1:]):
        parts = (names[0][1], *parts[1:])
    return Items(found.left, found.right, parts)


def _has_signs(text: str) -> bool:
    return _SIGNS.search(text) is not None


def _signs(text: str) -> tuple[str, ...]:
    if not _has_signs(text):
        return (text,)
    return _SIGNS.sub(lambda match: _UPPER[match[0]], text), _SIGNS.sub(lambda match: _LOWER[match[0]], text)


def _equal(found: Items, expected: Items, judge: Judge) -> bool:
    if max(len(found.parts), len(expected.parts)) > MOST_ITEMS:
        return [squeezed(part) for part in found.parts] == [squeezed(part) for part in expected.parts]
    kinds = {found.left + found.right, expected.left + expected.right}
    if len(kinds) > 1 and _apart(kinds, len(expected.parts)):
        return False
    left, right = _values(found, expected)
    if "{}" in kinds:
        return _unordered(_distinct(left, judge), _distinct(right, judge), judge)
    if kinds == {""}:
        return _unordered(left, right, judge)
    return _all(left, right, judge)


def _apart(kinds: set[str], count: int) -> bool:
    """Whether brackets of two kinds mean different things: sets and points do, and intervals of two ends."""
    if kinds == {"{}", "()"}:
        return True
    return count == 2 and any("[" in kind or "]" in kind for kind in kinds)


def _values(found: Items, expected: Items) -> tuple[list[str], list[str]]:
    """The items, without names where only one side names all of them."""
    names = [[named(part) for part in one.parts] for one in (found, expected)]
    values = [list(found.parts), list(expected.parts)]
    for mine, other in ((0, 1), (1, 0)):
        present = [pair for pair in names[mine] if pair is not None]
        if len(present) == len(values[mine]) and not any(names[other]):
            values[mine] = [value for _, value in present]
    return values[0], values[1]


def _distinct(parts: list[str], judge: Judge) -> list[str]:
    kept: list[str] = []
    for part in parts:
        if not any(judge(part, other) for other in kept):
            kept.append(part)
    return kept


def _unordered(found: list[str], expected: list[str], judge: Judge) -> bool:
    """Whether each item of one is an item of the other, one to one."""
    if len(found) != len(expected):
        return False
    left = list(expected)
    for part in found:
        place = next((index for index, other in enumerate(left) if judge(part, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def ratios(a: str, t: str, judge: Judge) -> bool | None:
    """Ratios such as 3:4, which are proportional to each other, or equal to a fraction."""
    found, expected = split(a, ":")[0], split(t, ":")[0]
    if len(found) == len(expected) == 1 or not all(found) or not all(expected):
        return None
    try:
        values: list[list[Value]] = [[constant(parse(part)) for part in parts] for parts in (found, expected)]
    except (Unreadable, TooLarge):
        return None
    if any(value is None or value == 0 for part in values for value in part):
        return None
    left, right = (
        [part[0] / part[1], 1] if len(part) == 2 else part + [1] * (len(part) == 1) for part in values
    )
    return len(left) == len(right) and all(
        close(x * right[0], y * left[0]) for x, y in zip(left, right, strict=True)
    )
