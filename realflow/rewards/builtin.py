"""Built-in rewards: 1.0 where the answer is right, else 0.0.

Texts of a model are of any form and size: whatever is in them costs time linear in their length,
and a number too long to be an answer is a wrong answer.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_PLAIN = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?"
# A sign counts unless it subtracts from what stands before it: 7-3 holds 7 and 3.
_NUMBER = re.compile(rf"(?:(?<![0-9A-Za-z_.)\]}}])[-+])?{_PLAIN}(?:/{_PLAIN})?")
_LONGEST = 200
_FRAC = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_TOKEN = re.compile(r"\\boxed\s*\{|\\fbox\s*\{|\\.|[{}]", re.DOTALL)
_WORDS = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\left|\\right|\\[!,;: ]|\{,\}(?=[0-9])|\$|\s|~")


def last_number(completion: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """1.0 where the last number of the completion equals the answer.

    An answer is a number, or text whose last number counts (so that `... #### 42` can stay as it
    is). Numbers may have a sign, thousands' commas, decimals, an exponent, or be a fraction `a/b`;
    they are compared by value: `0.50`, `1/2` and `.5` are equal.

    Raises ValueError for an answer that holds no number.
    """
    return [
        float(_equal(_last_value(text), _expected_number(expected)))
        for text, expected in zip(completion, answer, strict=True)
    ]


def boxed(completion: Sequence[str], answer: Sequence[Any]) -> list[float]:
    r"""1.0 where what stands in the last `\boxed{...}` of the completion equals the answer.

    Braces nest. Two numbers (also `\frac{a}{b}`) are compared by value, anything else as text
    without spaces, `$` and `\text{}`. An answer may be a number, text, or text with a box of its
    own. Without a closed box the reward is 0.0.

    Raises ValueError for an answer that is empty or neither number nor text.
    """
    return [
        float(_same_box(_last_box(text), _expected_text(expected)))
        for text, expected in zip(completion, answer, strict=True)
    ]


def _expected_number(answer: Any) -> Fraction | float:
    if isinstance(answer, int | float | Fraction) and not isinstance(answer, bool):
        value: Fraction | float | None = answer if math.isfinite(answer) else None
    else:
        value = _last_value(answer) if isinstance(answer, str) else None
    if value is None:
        raise ValueError(f"the answer {answer!r} holds no number, but last_number compares numbers")
    return value


def _expected_text(answer: Any) -> str:
    if isinstance(answer, bool) or not isinstance(answer, int | float | str) or not str(answer).strip():
        raise ValueError(f"the answer {answer!r} is neither a number nor a text that can be compared")
    text = str(answer)
    inner = _last_box(text)
    return text if inner is None else inner


def _last_value(text: str) -> Fraction | None:
    """Value of the last number in a text; None where there is none that can be read."""
    last = deque(_NUMBER.finditer(text.replace("\u2212", "-")), maxlen=1)
    return _value(last[0].group()) if last else None


def _value(number: str) -> Fraction | None:
    """Value of text that `_NUMBER` matches; None if it is over-long or divides by zero."""
    if len(number) > _LONGEST:
        return None
    above, _, below = number.replace(",", "").partition("/")
    divisor = Fraction(below) if below else Fraction(1)
    return Fraction(above) / divisor if divisor else None


def _equal(found: Fraction | None, expected: Fraction | float) -> bool:
    """Exact, except that a float is what is nearest to some decimal number."""
    if found is None:
        return False
    if isinstance(expected, float):
        return bool(abs(found - Fraction(expected)) <= Fraction(1, 10**9) * abs(Fraction(expected)))
    return found == expected


def _last_box(text: str) -> str | None:
    r"""Content of the `\boxed{}` that closes last, in one pass over the braces."""
    starts: list[int | None] = []  # of open braces: where a box's content starts, None for others
    content = None
    for token in _TOKEN.finditer(text):
        if token.group() == "}":
            start = starts.pop() if starts else None
            if start is not None:
                content = text[start : token.start()]
        elif token.group().startswith(("\\boxed", "\\fbox")):
            starts.append(token.end())
        elif token.group() == "{":
            starts.append(None)
    return content


def _same_box(found: str | None, expected: str) -> bool:
    if found is None:
        return False
    left, right = _simplify(found), _simplify(expected)
    if left == right:
        return bool(left)
    a, b = _whole_value(left), _whole_value(right)
    return a is not None and a == b


def _simplify(text: str) -> str:
    """Text without what only changes how it looks; a fraction of simple parts becomes `a/b`."""
    text = _NOISE.sub("", _WORDS.sub(r"\1", text.replace("\u2212", "-")))
    return _FRAC.sub(r"\1/\2", text).removesuffix(".")


def _whole_value(text: str) -> Fraction | None:
    """Value of a text that is one number from end to end."""
    match = _NUMBER.fullmatch(text)
    return None if match is None else _value(match.group())
