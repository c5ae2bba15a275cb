"""Whether two trees are one function: they are where their values are equal at several points.

Points at which both are real decide, positive ones first, then ones of both signs, so that `sqrt(x^2)` is not
`x`, while `log(x^2)` is `2 log x`, which is defined for positive x alone. Points are the same in each run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction

from realflow.rewards.answers.evaluate import (
    CLOSE,
    At,
    Undefined,
    Value,
    arithmetic,
    context,
    inexact,
    is_real,
    real,
    value,
)
from realflow.rewards.answers.tree import Apply, Symbol, Tree

CONSTANTS = {"e", "i", "\\pi", "\\infty", "\\imath"}


def letters(tree: Tree) -> set[str]:
    """The letters of a tree: its variables and constants."""
    if isinstance(tree, Symbol):
        return {tree.name}
    return set().union(*map(letters, tree.args)) if isinstance(tree, Apply) else set()


def symbols(tree: Tree) -> set[str]:
    """The variables of a tree."""
    return letters(tree) - CONSTANTS


def names(tree: Tree) -> set[str]:
    """The functions that a tree applies."""
    return {tree.name}.union(*map(names, tree.args)) if isinstance(tree, Apply) else set()


def close(a: Value, b: Value) -> bool:
    """Whether two values are equal, as far as they are known."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = inexact(a), inexact(b)
    if context.isinf(a) or context.isinf(b):
        return bool(a == b)
    largest = max(abs(a), abs(b))
    return bool(abs(a - b) <= CLOSE * largest or largest < 1e-38)


POINTS = 6


def points(variables: set[str], log_base: int | None = None, *, reals: bool = False) -> Iterator[At]:
    """Points that say whether two functions of these variables are one, the same in each run: positive
    ones first (of several sizes), then ones of both signs."""
    draw = random.Random(20260401)
    ordered = sorted(variables)
    for index in range(POINTS):
        low, high = ((105, 190), (31, 97), (210, 700))[index % 3]
        found = {}
        for name in ordered:
            sign = 1 if index < POINTS // 2 or draw.random() < 0.3 else -1
            found[name] = Fraction(sign * draw.randrange(low * 7, high * 7), 701)
        yield At(found, log_base, reals)


def whole_points(variables: set[str]) -> Iterator[At]:
    """Points of whole numbers, for variables that count."""
    ordered = sorted(variables)
    for start in range(1, 13):
        yield At({name: Fraction(start + 2 * place) for place, name in enumerate(ordered)})


_COUNTING = {"n", "k", "m", "N", "K", "M", "j", "l"}


def identical(a: Tree, b: Tree) -> bool | None:
    """Whether two trees are one function; None where no point decides.

    Raises TooLarge, Unreadable.
    """
    variables = symbols(a) | symbols(b)
    bases = (None, 10) if "log" in names(a) | names(b) else (None,)
    found: bool | None = None
    for base in bases:
        found = _agree_in(a, b, variables, base)
        if found:
            return True
    if found is False and variables and variables <= _COUNTING:
        return bool(_agree(a, b, whole_points(variables)))
    return found


def _agree_in(a: Tree, b: Tree, variables: set[str], base: int | None) -> bool | None:
    """By real numbers where these decide, else by complex ones."""
    if not variables:
        return _agree(a, b, iter([At({}, base)]))
    imaginary = {"i", "\\imath"} & (letters(a) | letters(b))
    found = None if imaginary else _agree(a, b, points(variables, base, reals=True))
    return _agree(a, b, points(variables, base)) if found is None else found


def _agree(a: Tree, b: Tree, at_points: Iterator[At]) -> bool | None:
    """Equal at all points that decide. One where only one side is real, or none defined, decides nothing."""
    decided = 0
    for at in at_points:
        try:
            left, right = value(a, at), value(b, at)
        except Undefined:
            continue
        if is_real(left) != is_real(right) and at.values:
            continue
        if is_real(left) and is_real(right):
            left, right = real(left), real(right)
        elif at.values and any(number < 0 for number in at.values.values()):
            continue
        if not close(left, right):
            return False
        decided += 1
    return True if decided else None


def proportional(a: Tree, b: Tree) -> int:
    """The sign of the constant c with a = c b at every point (1 or -1); 0 where there is none."""
    variables = symbols(a) | symbols(b)
    ratio: Value | None = None
    count = 0
    for at in points(variables) if variables else ():
        try:
            left, right = value(a, at), value(b, at)
        except Undefined:
            continue
        if close(left, Fraction(0)) or close(right, Fraction(0)):
            return 0
        found = arithmetic("div", left, right)
        if not is_real(found) or (ratio is not None and not close(found, ratio)):
            return 0
        ratio, count = real(found), count + 1
    return 0 if ratio is None or count < 3 else 1 if ratio > 0 else -1


def constant(tree: Tree) -> Value | None:
    """The value of a tree without variables; None with them, or where it has no real value."""
    if symbols(tree):
        return None
    try:
        found = value(tree, At({}))
    except Undefined:
        return None
    return real(found) if is_real(found) else None
