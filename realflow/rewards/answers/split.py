r"""Cutting normal text at what stands outside of all brackets: lists, tuples, sets, relations, matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MARK = re.compile(
    r"\\begin\{[a-z]*\}|\\end\{[a-z]*\}|\\[A-Za-z]+|\\[{}\\]|[()\[\]{}]|\"[^\"]*\"|[,;=<>:|]"
    r"|[^\\()\[\]{}\",;=<>:|]+|.",
    re.DOTALL,
)
_OPEN = ("(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil")
_CLOSE = (")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil")


def split(text: str, *marks: str) -> tuple[list[str], list[str]]:
    """The parts of a text between marks that stand outside of brackets, and the marks. Brackets of
    different kinds close each other: half-open intervals mix them."""
    parts, found, depth = [""], [], 0
    for match in _MARK.finditer(text):
        token = match.group()
        if token in _OPEN or token.startswith("\\begin"):
            depth += 1
        elif token in _CLOSE or token.startswith("\\end"):
            depth -= 1
        if depth == 0 and token in marks:
            found.append(token)
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts], found


@dataclass(frozen=True)
class Items:
    """A list: its brackets ("(" and ")" in any mixture with square ones, "{" for a set, "" for none)."""

    left: str
    right: str
    parts: tuple[str, ...]


def items(text: str) -> Items | None:
    """The items of a text that is a tuple, an interval, a set or a list without brackets; else None."""
    text = text.strip()
    inside = enclosed(text)
    if inside is not None:
        left, inner, right = inside
        parts, marks = split(inner, ",", ";")
        if left == "{" or marks:
            return Items(left, right, tuple(part for part in parts if part))
        return None
    parts, marks = split(text, ",", ";")
    parts = [part for part in parts if part]
    return Items("", "", tuple(parts)) if marks and len(parts) > 1 else None


def enclosed(text: str) -> tuple[str, str, str] | None:
    """(bracket, content, bracket) where one pair of brackets holds all of a text; sets are "{" and "}"."""
    for left in ("\\{", "\\langle", "(", "[", "{"):
        if not text.startswith(left):
            continue
        for right in ("\\}", "\\rangle", ")", "]", "}"):
            if text.endswith(right) and not (right == "}" and text.endswith("\\}")):
                inner = text[len(left) : -len(right)]
                if not _nested(inner) or (left in ("{", "\\{")) != (right in ("}", "\\}")):
                    return None
                if left == "{" and not split(inner, ",")[1]:
                    return None
                names = {"\\{": "{", "\\}": "}", "\\langle": "(", "\\rangle": ")"}
                return names.get(left, left), inner.strip(), names.get(right, right)
    return None


def _nested(text: str) -> bool:
    """Whether brackets never close more than they open."""
    depth = 0
    for match in _MARK.finditer(text):
        token = match.group()
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


_MATRIX = re.compile(
    r"^[(\[|]?\s*\\begin\{([pbvBV]?matrix|array|smallmatrix)\}(?:\s*\{[^{}]*\})?(.*)\\end\{\1\}\s*[)\]|]?$",
    re.DOTALL,
)


@dataclass(frozen=True)
class Matrix:
    """Rows of texts; `bars` where it is a determinant."""

    rows: tuple[tuple[str, ...], ...]
    bars: bool = False


def matrix(text: str) -> Matrix | None:
    """The entries of a text that is one matrix; else None."""
    match = _MATRIX.match(text.strip())
    if match is None or "\\begin" in match[2]:
        return None
    rows = [
        row
        for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", match[2].replace("\\hline", " "))
        if row.strip()
    ]
    cells = tuple(tuple(cell.strip() for cell in row.split("&")) for row in rows)
    if not cells or len({len(row) for row in cells}) != 1:
        return None
    return Matrix(cells, match[1] in ("vmatrix", "Vmatrix"))
