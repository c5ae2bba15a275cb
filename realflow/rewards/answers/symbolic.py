r"""What the parser of this room cannot read (sums, integrals, sets of a rarer kind) goes to math-verify.

Its parser of LaTeX (latex2sympy2_extended) builds sympy objects from a grammar. Its other parser, of plain
numbers, hands text to Python's `eval` by way of sympy's `parse_expr`, and is not used here: what gets there
are the digits of a number alone, as `sympy.Number` reads them. sympy may take for ever or fill the memory:
call this in a worker only (`realflow.rewards.pool`).
"""

from __future__ import annotations

import logging
import re
from typing import Any

LONGEST = 400
"""Characters of the longest text that is handed over."""
_MOST_NODES = 400
_ERRORS = (ValueError, TypeError, AttributeError, NotImplementedError, ArithmeticError, RecursionError)
_REFUSED = re.compile(
    r"\^\s*\{?[^{}^]*\}?\s*\^\s*\{?[^{}^]*\}?\s*\^|\d{40}|\\(?:input|include|def|write|operatorname)"
)


def equal(answer: str, truth: str) -> bool | None:
    """Whether math-verify finds two normal texts equal; None where it cannot read the truth.

    An answer that it cannot read is different, and so is one that sympy fails on. Where sympy fails on the
    truth, what it raises is raised.
    """
    expected = _parsed(truth)
    if expected is None:
        return None
    found = _parsed(answer)
    if found is None:
        return False
    try:
        return _verified(found, expected)
    except _ERRORS:
        _verified(expected, expected)  # raises where it is the truth that sympy cannot deal with
        return False


def _verified(found: Any, expected: Any) -> bool:
    from math_verify import verify

    return bool(verify(expected, found, timeout_seconds=None, raise_on_error=True))


def prepare() -> None:
    """Import math-verify and warm its parser up, so that the first answer does not pay for it."""
    equal("1+x", "x+1")


def _parsed(text: str) -> Any | None:
    """A sympy object, or None for what is not understood or is too large."""
    if len(text) > LONGEST or _REFUSED.search(text):
        return None
    from math_verify import parse
    from math_verify.parser import LatexExtractionConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)
    written = re.sub(r'"([^"]*)"', r"\\text{\1}", text).replace("\\cur ", "").replace("*", r"\cdot ")
    found = parse(
        f"${written}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    return found[0] if found and _small(found[0]) else None


def _small(tree: Any) -> bool:
    """Whether no power, factorial or binomial in a tree is of a size that sympy would never end with."""
    import sympy

    if not isinstance(tree, sympy.Basic):
        return True
    for count, node in enumerate(sympy.preorder_traversal(tree)):
        if count > _MOST_NODES:
            return False
        large = [part for part in node.args if part.is_Integer and abs(part) > 10_000]
        if large and isinstance(node, sympy.Pow | sympy.factorial | sympy.binomial):
            return False
    return True
