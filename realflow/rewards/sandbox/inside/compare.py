"""Whether what a program gave is what was expected. Pure; used on the outer side alone."""

from __future__ import annotations

import math
import re
from typing import Any

_DECIMAL = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]{1,4})?|[-+]?(?:inf|nan)"
)


def same_text(found: str, expected: str, tolerance: float) -> bool:
    """Whether two outputs are the same, but for white space at the ends of lines and empty lines at the end.

    Where the expected text has a decimal number (`0.25`, `1e-3`), a number within `tolerance` of it
    (relative, or absolute below 1) is as good; whole numbers and words are exact.
    """
    lines = [line.rstrip() for line in found.rstrip().splitlines()]
    wanted = [line.rstrip() for line in expected.rstrip().splitlines()]
    if lines == wanted:
        return True
    if tolerance == 0 or len(lines) != len(wanted):
        return False
    return all(_same_words(a.split(), b.split(), tolerance) for a, b in zip(lines, wanted, strict=True))


def _same_words(found: list[str], expected: list[str], tolerance: float) -> bool:
    if len(found) != len(expected):
        return False
    return all(a == b or _near_number(a, b, tolerance) for a, b in zip(found, expected, strict=True))


def _near_number(found: str, expected: str, tolerance: float) -> bool:
    if len(found) > 400 or not _DECIMAL.fullmatch(expected):
        return False
    try:
        return _near(float(found), float(expected), tolerance)
    except ValueError:
        return False


def same_value(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether two plain values are the same. Lists and tuples are alike (JSON has no tuples), as are the keys
    of dicts and their texts; a float is the same within `tolerance` (relative, or absolute below 1)."""
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        pairs = zip(found, expected, strict=False)
        return len(found) == len(expected) and all(same_value(a, b, tolerance) for a, b in pairs)
    if isinstance(found, dict) and isinstance(expected, dict):
        texts = {str(key): value for key, value in found.items()}
        return len(texts) == len(expected) and all(
            str(key) in texts and same_value(texts[str(key)], value, tolerance)
            for key, value in expected.items()
        )
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    numbers = isinstance(found, int | float) and isinstance(expected, int | float)
    if numbers and (isinstance(found, float) or isinstance(expected, float)):
        return _near(found, expected, tolerance)
    return type(found) is type(expected) and bool(found == expected)


def _near(found: float, expected: float, tolerance: float) -> bool:
    if found == expected or (math.isnan(found) and math.isnan(expected)):
        return True
    try:
        return abs(found - expected) <= tolerance * max(1.0, abs(expected)) < math.inf
    except OverflowError:  # a whole number beyond all floats
        return False
