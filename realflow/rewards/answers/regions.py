r"""Sets of real numbers as people write them: intervals, unions, inequalities, "all real numbers".

`region` reads any of them into pieces, so that `x > 2`, `(2, \infty)` and `\{x : x > 2\}` are one. Ends are
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from realflow.rewards.answers.evaluate import Value, inexact
from realflow.rewards.answers.identity import close, constant
from realflow.rewards.answers.split import enclosed, items, split
from realflow.rewards.answers.tokens import Unreadable
from realflow.rewards.answers.tree import Apply, Symbol, Tree, parse

_LESS = {"<": True, "\\le": False}
_MORE = {">": True, "\\ge": False}
INFINITE: Tree = Symbol("\\infty")
_MINUS: Tree = Apply("neg", (INFINITE,))


@dataclass(frozen=True)
class Piece:
    """From `low` to `high`; whether each end is left out. A point has two closed ends that are equal."""

    low: Value
    high: Value
    low_open: bool
    high_open: bool


@dataclass(frozen=True)
class Region:
    """Pieces in order, apart from each other. `variable` is the letter it was written about, if any."""

    pieces: tuple[Piece, ...]
    variable: str | None = None


def region(text: str) -> Region | None:
    """The set of real numbers that normal text means; None where it means something else.

    A single pair of round or square brackets is one too: whether it is a point of the plane is not said.
    """
    text = text.strip()
    match = re.match(r"^([A-Za-z]|\\[a-z]+)\s*\\in(?![a-z])(.*)$", text, re.DOTALL)
    variable = match[1] if match else None
    found = _pieces(match[2].strip() if match else text)
    if found is None:
        return None
    pieces, name = found
    return Region(_ordered(pieces), variable or name)


_Found = tuple[list[Piece], str | None]


def _pieces(text: str) -> _Found | None:
    plain = text.replace('"', "").strip().lower()
    if text in ("\\R", "\\mathbb{R}") or re.fullmatch(
        r"all real(?: numbers?| values?)?|(?:the )?set of all real numbers|all reals|reals", plain
    ):
        return [_piece(_MINUS, INFINITE, True, True)], None
    parts, marks = split(text, "\\setminus")
    if len(marks) == 1:
        return _without(parts[0], parts[1])
    parts, marks = split(text, "\\cup")
    if not marks:
        parts, marks = split(text, "\\cap")
        if marks:
            return _joined([_pieces(part) for part in parts], together=True, apart=False)
        parts, marks = split(text, ",")
        if marks and not all(_is_relation(part) for part in parts):
            return None
    if marks:
        return _joined([_pieces(part) for part in parts], together=marks[0] == ",")
    inside = enclosed(text)
    if inside is not None:
        return _bracketed(*inside)
    return _relation(text)


def _is_relation(text: str) -> bool:
    return bool(split(text, "<", ">", "\\le", "\\ge", "\\ne")[1])


def _joined(found: list[_Found | None], *, together: bool, apart: bool = True) -> _Found | None:
    """All pieces of a union; inequalities in a list hold `together` where they can (`x > 2, x < 5`), else
    `apart`."""
    if any(part is None for part in found):
        return None
    present = [part for part in found if part is not None]
    names = {name for _, name in present if name is not None}
    if len(names) > 1:
        return None
    name = names.pop() if names else None
    kept = present[0][0] if together else []
    for pieces, _ in present[1:]:
        kept = [both for a in kept for b in pieces if (both := _common(a, b)) is not None]
    return kept if kept or not apart else [piece for pieces, _ in present for piece in pieces], name


def _common(a: Piece, b: Piece) -> Piece | None:
    low = max(a, b, key=lambda piece: (inexact(piece.low), piece.low_open))
    high = min(a, b, key=lambda piece: (inexact(piece.high), not piece.high_open))
    if inexact(low.low) > inexact(high.high) or (
        close(low.low, high.high) and (low.low_open or high.high_open)
    ):
        return None
    return Piece(low.low, high.high, low.low_open, high.high_open)


def _without(base: str, removed: str) -> _Found | None:
    """A region without some points."""
    found, points = _pieces(base), items(removed)
    if found is None or points is None or points.left != "{":
        return None
    pieces = found[0]
    for part in points.parts:
        gap = [_piece(_MINUS, _tree(part), True, True), _piece(_tree(part), INFINITE, True, True)]
        pieces = [both for a in pieces for b in gap if (both := _common(a, b)) is not None]
    return pieces, found[1]


def _bracketed(left: str, inner: str, right: str) -> _Found | None:
    """An interval, or a set given by a relation or by its numbers."""
    if left == "{":
        for mark in ("|", ":"):
            parts, marks = split(inner, mark)
            if len(marks) == 1 and re.fullmatch(r"(?:[A-Za-z]|\\[a-z]+)\s*(?:\\in\s*\\R)?", parts[0]):
                return _pieces(re.sub(r"^(?:[A-Za-z])\s*\\in\s*\\R\s*,", "", parts[1]).strip())
        parts, _ = split(inner, ",")
        return [_piece(_tree(part), _tree(part), False, False) for part in parts if part], None
    parts, marks = split(inner, ",", ";")
    if len(marks) != 1:
        return None
    return [_piece(_tree(parts[0]), _tree(parts[1]), left == "(", right == ")")], None


def _relation(text: str) -> _Found | None:
    """`x > 2`, `2 < x`, `1 < x \\le 3`, `x \\ne 3`; None for relations that are not about one letter."""
    sides, marks = split(text, "<", ">", "\\le", "\\ge", "\\ne")
    trees = [_tree(side) for side in sides] if 1 <= len(marks) <= 2 else []
    places = [
        place
        for place, tree in enumerate(trees)
        if isinstance(tree, Symbol) and tree.name not in ("\\pi", "e", "\\infty")
    ]
    if len(places) != 1 or (len(marks) == 2 and places != [1]):
        return None
    tree = trees[places[0]]
    assert isinstance(tree, Symbol)
    if marks == ["\\ne"]:
        other = trees[1 - places[0]]
        return [_piece(_MINUS, other, True, True), _piece(other, INFINITE, True, True)], tree.name
    if "\\ne" in marks:
        return None
    low, high = (_MINUS, True), (INFINITE, True)
    for place, mark in enumerate(marks):
        rising = mark in _LESS
        opened = (_LESS if rising else _MORE)[mark]
        left_is_letter = place == places[0]
        other = trees[place + 1] if left_is_letter else trees[place]
        if left_is_letter == rising:
            high = (other, opened)
        else:
            low = (other, opened)
    return [_piece(low[0], high[0], low[1], high[1])], tree.name


def _tree(text: str) -> Tree:
    return parse(text)


def _piece(low: Tree, high: Tree, low_open: bool, high_open: bool) -> Piece:
    """A piece with numbers for ends. Raises Unreadable where an end has letters."""
    ends: list[Value] = [constant(low), constant(high)]
    if any(end is None for end in ends):
        raise Unreadable("an end that is no number")
    infinite = [not isinstance(end, Fraction) and abs(end) == float("inf") for end in ends]
    return Piece(ends[0], ends[1], low_open or infinite[0], high_open or infinite[1])


def _ordered(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Pieces by their lower ends, those that touch made one; an empty one is left out, unless it is the only
    one: (3, 2) is then no interval but a pair."""
    rest = sorted(pieces, key=lambda piece: (inexact(piece.low), piece.low_open))
    merged: list[Piece] = []
    for piece in rest:
        last = merged[-1] if merged else None
        if last is not None and _touch(last, piece):
            end = max(last, piece, key=lambda one: (inexact(one.high), not one.high_open))
            merged[-1] = Piece(last.low, end.high, last.low_open, end.high_open)
        else:
            merged.append(piece)
    return tuple(merged)


def _touch(a: Piece, b: Piece) -> bool:
    if close(a.high, b.low):
        return not (a.high_open and b.low_open)
    return inexact(b.low) < inexact(a.high)


def equal_regions(a: Region, b: Region, same_end: Callable[[Any, Any], bool] = close) -> bool:
    """Whether two regions are one; letters must be the same where both have one."""
    if a.variable is not None and b.variable is not None and a.variable != b.variable:
        return False
    return len(a.pieces) == len(b.pieces) and all(
        one.low_open == other.low_open
        and one.high_open == other.high_open
        and same_end(one.low, other.low)
        and same_end(one.high, other.high)
        for one, other in zip(a.pieces, b.pieces, strict=True)
    )
