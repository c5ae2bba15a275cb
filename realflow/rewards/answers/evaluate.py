"""Values of trees: exact fractions as long as they can be exact, else 50 digits.

A power or factorial that would fill the memory is `TooLarge`, and never computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from mpmath import MPContext

from realflow.rewards.answers.tokens import TooLarge, Unreadable
from realflow.rewards.answers.tree import Number, Symbol, Tree

DIGITS = 50
MOST_BITS = 200_000
LARGEST_FACTORIAL = 3000

context: Any = MPContext()
context.dps = DIGITS

CLOSE = 1e-25
"""How far apart, relatively, two values of 50 digits may be and count as equal."""

Value: TypeAlias = Any
"""A Fraction, or a number of mpmath."""


class Undefined(Exception):
    """No value: a division by zero, a logarithm of zero."""


@dataclass(frozen=True)
class At:
    """Where a tree is evaluated: the values of its variables, the base of a logarithm without one.

    `real` says that only real numbers are meant, so that nothing in it may be the root of a negative one.
    """

    values: Mapping[str, Fraction]
    log_base: int | None = None
    real: bool = False


def value(tree: Tree, at: At) -> Value:
    """The value of a tree: a Fraction, or a number of mpmath. Raises TooLarge, Undefined, Unreadable."""
    if isinstance(tree, Number):
        return tree.value
    if isinstance(tree, Symbol):
        return _symbol(tree.name, at)
    found = [value(argument, at) for argument in tree.args]
    try:
        result = _apply(tree.name, found, at)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
        raise Undefined(str(error)) from None
    if not isinstance(result, Fraction) and context.isnan(result):
        raise Undefined("not a number")
    if at.real and not is_real(result):
        raise Undefined("not a real number")
    return result


def is_real(a: Value) -> bool:
    """Whether a value is real, but for what rounding left."""
    return isinstance(a, Fraction) or bool(abs(context.im(a)) <= CLOSE * (1 + abs(context.re(a))))


def real(a: Value) -> Value:
    """The real part."""
    return a if isinstance(a, Fraction) else context.re(a)


def _symbol(name: str, at: At) -> Value:
    constants = {"e": context.e, "\\pi": context.pi, "i": context.j, "\\imath": context.j}
    if name == "\\infty":
        return context.inf
    if name in constants:
        return +constants[name]
    if name not in at.values:
        raise Unreadable(name)
    return at.values[name]


def _apply(name: str, found: list[Value], at: At) -> Value:
    a = found[0]
    b = found[1] if len(found) > 1 else None
    if name == "neg":
        return -a
    if name in ("add", "mul", "div"):
        return arithmetic(name, a, b)
    if name == "pow":
        return power(a, b)
    if name == "root":
        return _root(a, b)
    if name in ("factorial", "binom"):
        return _factorial(a) if name == "factorial" else _binomial(a, b)
    if name == "degrees":
        return inexact(a) * context.pi / 180
    if name in ("gcd", "lcm", "min", "max"):
        return _several(name, found)
    if name in ("abs", "floor", "ceil", "sgn"):
        return _rounded(name, a)
    return _function(name, a, b, at)


def inexact(number: Value) -> Any:
    """A value as a number of mpmath."""
    return context.mpf(number.numerator) / number.denominator if isinstance(number, Fraction) else number


def arithmetic(name: str, a: Value, b: Value) -> Value:
    """The sum (add), product (mul) or quotient (div) of two values, exact where both are."""
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        a, b = inexact(a), inexact(b)
    elif max(map(_bits, (a, b))) > MOST_BITS:
        raise TooLarge("a number too long")
    return a + b if name == "add" else a * b if name == "mul" else a / b


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def power(a: Value, b: Value) -> Value:
    """`a` to the `b`: exact where both are; a real root of a negative number where there is one."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        if b.denominator == 1:
            if abs(a) == 1:
                return a ** (int(b) % 2)
            if a and _bits(a) * abs(b.numerator) > MOST_BITS:
                raise TooLarge("a power too large")
            return a ** int(b)
        if a < 0 and b.denominator % 2 == 1:
            root = power(-a, b)
            return -root if b.numerator % 2 else root
    a, b = inexact(a), inexact(b)
    if a != 0 and context.isfinite(a) and context.isfinite(b):
        size = abs(b) * (abs(context.log(abs(a))) + 4)
        if size > MOST_BITS:
            raise TooLarge("a power too large")
    return context.power(a, b)


def _root(a: Value, degree: Value) -> Value:
    if isinstance(degree, Fraction) and degree:
        return power(a, 1 / degree)
    raise Undefined("a root of an odd kind")


def _factorial(a: Value) -> Value:
    if isinstance(a, Fraction) and a.denominator == 1:
        if a < 0:
            raise Undefined("a factorial of a negative number")
        if a > LARGEST_FACTORIAL:
            raise TooLarge("a factorial too large")
        return Fraction(math.factorial(int(a)))
    return _gamma(inexact(a) + 1)


def _gamma(a: Any) -> Any:
    if abs(a) > LARGEST_FACTORIAL:
        raise TooLarge("a factorial too large")
    return context.gamma(a)


def _binomial(n: Value, k: Value) -> Value:
    exact = isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1
    if exact and 0 <= k <= n:
        if n > 2 * LARGEST_FACTORIAL:
            raise TooLarge("a binomial coefficient too large")
        return Fraction(math.comb(int(n), int(k)))
    n, k = inexact(n), inexact(k)
    return _gamma(n + 1) / _gamma(k + 1) / _gamma(n - k + 1)


def _several(name: str, found: list[Value]) -> Value:
    if not all(isinstance(number, Fraction) for number in found):
        raise Unreadable(name)
    if name in ("min", "max"):
        return min(found) if name == "min" else max(found)
    result = found[0]
    for number in found[1:]:
        if result.denominator != 1 or number.denominator != 1:
            raise Unreadable(name)
        function = math.gcd if name == "gcd" else math.lcm
        result = Fraction(function(int(result), int(number)))
    return result


def _rounded(name: str, a: Value) -> Value:
    if name == "abs":
        return abs(a)
    if not isinstance(a, Fraction):
        if context.im(a) != 0:
            raise Undefined(f"{name} of a complex number")
        if name != "sgn" and abs(a) < 10**DIGITS:
            whole = context.floor(a) if name == "floor" else context.ceil(a)
            return Fraction(int(whole))
        return Fraction(int(context.sign(a))) if name == "sgn" else a
    if name == "sgn":
        return Fraction((a > 0) - (a < 0))
    return Fraction(a.__floor__() if name == "floor" else a.__ceil__())


def _function(name: str, a: Value, b: Value, at: At) -> Value:
    a = inexact(a)
    if name in ("log", "ln", "lg"):
        if a == 0:
            raise Undefined("a logarithm of zero")
        base = 10 if name == "lg" else at.log_base if name == "log" and b is None else b
        return context.log(a) if base is None or name == "ln" else context.log(a) / context.log(inexact(base))
    if name == "exp":
        return power(context.e, a)
    if name == "cbrt":
        return context.sign(a) * power(abs(a), context.mpf(1) / 3)
    if context.isfinite(a) and abs(a) > 10**12:
        raise TooLarge(f"{name} of a number too large")
    known = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec",
             "arccsc": "acsc"}  # fmt: skip
    return getattr(context, known.get(name, name))(a)
