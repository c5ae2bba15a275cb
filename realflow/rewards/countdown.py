"""`rewards.countdown`: an equation that makes a target from given numbers."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from realflow.graph.builtins import check_options

_LONGEST = 400
_TAG = re.compile(r"<answer>|</answer>")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def countdown(
    completion: Sequence[str],
    numbers: Sequence[Any],
    target: Sequence[Any],
    *,
    use_all: bool = False,
    format_score: float = 0.0,
) -> list[float]:
    """1.0 where the last `<answer>` of a completion is arithmetic that gives the target.

    It may hold the four operations, parentheses, and each of the row's `numbers` at most once (with `use_all`
    exactly once); what follows `=` is not read. `format_score` is given for arithmetic of numbers that is
    wrong in value or in its numbers; text without tags, or that is not arithmetic, gets 0.0.

    Raises ValueError for a row whose numbers or target are not whole numbers.
    """
    check_options("rewards.countdown", format_score=format_score)
    rewards = []
    for text, given, wanted in zip(completion, numbers, target, strict=True):
        have = Counter(_whole(number) for number in _listed(given))
        goal = _whole(wanted)
        answer = tagged(text)
        found = None if answer is None else arithmetic(answer)
        if found is None:
            rewards.append(0.0)
            continue
        used = Counter(found[1])
        right = found[0] == goal and used <= have and (used == have or not use_all)
        rewards.append(1.0 if right else format_score)
    return rewards


def tagged(text: str) -> str | None:
    """What stands between the last `</answer>` and the `<answer>` before it; None without such a pair."""
    start, found = None, None
    for tag in _TAG.finditer(text):
        if tag.group() == "<answer>":
            start = tag.end()
        elif start is not None:
            found, start = text[start : tag.start()], None
    return found


def arithmetic(text: str) -> tuple[Fraction | None, list[int]] | None:
    """The exact value of arithmetic on whole numbers (None where it divides by zero), and the numbers in it;
    None for any other text. It is parsed, never evaluated."""
    text = text.translate(_SIGNS).partition("=")[0].strip()
    if not text or len(text) > _LONGEST:
        return None
    try:
        tree = ast.parse(text, mode="eval").body
        used: list[int] = []
        return _value(tree, used), used
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, used: list[int]) -> Fraction | None:
    """Raises ValueError for what is not arithmetic."""
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            used.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
            value = _value(inner, used)
            return value if value is None or isinstance(sign, ast.UAdd) else -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left, used), _value(right, used)
            if a is None or b is None or (isinstance(op, ast.Div) and b == 0):
                return None
            return _OPERATORS[type(op)](a, b)
    raise ValueError("not arithmetic")


def _listed(numbers: Any) -> Sequence[Any]:
    if not isinstance(numbers, list | tuple):
        raise ValueError(f"the numbers are {numbers!r:.80}; expected a list of whole numbers")
    return numbers


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int | float) or number != int(number):
        raise ValueError(f"found {number!r:.80} among numbers and target; expected whole numbers")
    return int(number)
