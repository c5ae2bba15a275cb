"""The tokens of normal text: numbers, letters, marks, commands of LaTeX and plain names of functions."""

from __future__ import annotations

import re
from fractions import Fraction

MOST_TOKENS = 800
MOST_DIGITS = 2000


class Unreadable(Exception):
    """Not an expression that this parser knows."""


class TooLarge(Exception):
    """An expression, or a value, that is not computed because of its size."""


FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "arcsec",
             "arccsc", "sinh", "cosh", "tanh", "asin", "acos", "atan", "ln", "log", "lg", "exp", "abs",
             "floor", "ceil", "cbrt", "sgn"}  # fmt: skip
SEVERAL = {"gcd", "lcm", "min", "max", "binom"}
GREEK = {"alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta",
         "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi",
         "omega", "Gamma", "Delta", "Theta", "Lambda", "Sigma", "Phi", "Psi", "Omega", "ell", "pi", "infty",
         "imath", "hbar"}  # fmt: skip
ACCENTS = {"overline", "bar", "vec", "hat", "tilde", "widehat", "overrightarrow"}

_TOKEN = re.compile(
    r"""(?P<repeat>\d*\.\d*\\(?:overline|bar|dot)\s*\{\s*\d+\s*\})
      | (?P<number>\d+\.(?!\d|\\)|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4}(?![\d.]))?)
      | (?P<command>\\[A-Za-z]+|\\[%{}])
      | (?P<quoted>"[^"]*")
      | (?P<word>[A-Za-z]+)
      | (?P<mark>[-+*/^_!()\[\]{}|,'])
      | (?P<space>\s+)""",
    re.VERBOSE,
)


def tokens(text: str) -> list[str]:
    """The tokens of normal text, function names in plain words as commands. Raises Unreadable."""
    found: list[str] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if len(found) > MOST_TOKENS:
            raise TooLarge("too many tokens")
        if match is None:
            raise Unreadable(text[place : place + 20])
        place = match.end()
        kind, token = match.lastgroup, match.group()
        if kind == "word":
            found += _letters(token)
        elif kind == "quoted":
            found += _quoted(token)
        elif kind != "space":
            found.append(token)
    return found


def _letters(word: str) -> list[str]:
    """A run of letters: a function's name, a name and letters after it, or letters."""
    if word in FUNCTIONS | SEVERAL:
        return ["\\" + word]
    for name in sorted(FUNCTIONS, key=len, reverse=True):
        if len(name) >= 2 and word.startswith(name) and len(word) <= len(name) + 2:
            return ["\\" + name, *word[len(name) :]]
    if len(word) > 4:
        raise Unreadable(word)
    return list(word)


def _quoted(token: str) -> list[str]:
    inner = token[1:-1].strip()
    if inner == "degrees":
        return [token]
    if re.fullmatch(r"[A-Za-z]{1,3}", inner):
        return list(inner)
    if re.fullmatch(r"-?\d+(?:\.\d+)?", inner):
        return list(inner) if inner.startswith("-") else [inner]
    raise Unreadable(token)


def exact(token: str) -> Fraction:
    """The value of a number's token, repeating decimals included. Raises Unreadable for one too long."""
    if len(token) > MOST_DIGITS:
        raise TooLarge("a number too long")
    match = re.fullmatch(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{\s*(\d+)\s*\}", token)
    if match is None:
        return Fraction(token.removesuffix("."))
    whole, head, cycle = match.groups()
    start = Fraction(int(whole or 0)) + (Fraction(int(head), 10 ** len(head)) if head else 0)
    return start + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(head))
