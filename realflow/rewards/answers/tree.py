r"""Expressions of answers as trees: a parser of normal text (`normal.py`), LaTeX and plain alike.

It reads what answers are made of (numbers, letters, fractions, roots, powers, functions, absolute values,
factorials, binomials) and nothing that runs: `Unreadable` is raised for sums, integrals and whatever else
it does not know. What stands beside each other is multiplied; `tight` says that this binds closer than a
slash (`1/2x` is then 1/(2x)).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from realflow.rewards.answers.tokens import (
    ACCENTS,
    FUNCTIONS,
    GREEK,
    SEVERAL,
    TooLarge,
    Unreadable,
    exact,
    tokens,
)

DEEPEST = 60


@dataclass(frozen=True)
class Number:
    """An exact number."""

    value: Fraction


@dataclass(frozen=True)
class Symbol:
    """A variable, or the constants `e`, `i`, `\\pi`, `\\infty`."""

    name: str


@dataclass(frozen=True)
class Apply:
    """A function or operator of its arguments."""

    name: str
    args: tuple[Tree, ...]


Tree = Number | Symbol | Apply

_INVERSE = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}


def parse(text: str, *, tight: bool = False) -> Tree:
    """The tree of normal text. Raises Unreadable, TooLarge."""
    parser = _Parser(tokens(text), tight)
    tree = parser.sum()
    if parser.tokens:
        raise Unreadable(parser.tokens[-1])
    return tree


def _is_differential(tree: Tree) -> bool:
    """Whether a tree is `d`, or `d` times something: what derivatives are written with."""
    first = tree.args[0] if isinstance(tree, Apply) and tree.name == "mul" else tree
    return first == Symbol("d")


class _Parser:
    """Recursive descent; `tokens` are what is left, the next one last."""

    def __init__(self, found: list[str], tight: bool) -> None:
        self.tokens, self.tight = found[::-1], tight
        self.depth, self.bars = 0, 0

    def peek(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, *wanted: str) -> bool:
        if self.peek() in wanted and self.tokens:
            self.tokens.pop()
            return True
        return False

    def need(self, wanted: str) -> None:
        if not self.take(wanted):
            raise Unreadable(f"{wanted} is missing")

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > DEEPEST:
            raise TooLarge("too deep")
        tree = self.product()
        while self.peek() in ("+", "-"):
            sign = self.tokens.pop()
            right = self.product()
            tree = Apply("add", (tree, right if sign == "+" else Apply("neg", (right,))))
        self.depth -= 1
        return tree

    def product(self) -> Tree:
        if self.take("-"):
            return Apply("neg", (self.product(),))
        if self.take("+"):
            return self.product()
        tree = self.beside() if self.tight else self.power()
        while True:
            if self.take("*"):
                tree = Apply("mul", (tree, self.factor()))
            elif self.take("/"):
                tree = Apply("div", (tree, self.factor()))
            elif self.starts():
                tree = Apply("mul", (tree, self.power()))
            else:
                return tree

    def factor(self) -> Tree:
        """What stands after a sign of multiplication; it may have a sign of its own."""
        if self.take("-"):
            return Apply("neg", (self.factor(),))
        if self.take("+"):
            return self.factor()
        return self.beside() if self.tight else self.power()

    def beside(self) -> Tree:
        tree = self.power()
        while self.starts():
            tree = Apply("mul", (tree, self.power()))
        return tree

    def starts(self) -> bool:
        """Whether what comes next begins a factor that is multiplied with what stands before it."""
        token = self.peek()
        if token == "|":
            return self.bars == 0
        if token.startswith("\\"):
            return token not in ("\\}", "\\%", "\\rangle", "\\rfloor", "\\rceil")
        return token in ("(", "[", "{") or (token.isalpha() and len(token) == 1)

    def power(self) -> Tree:
        tree = self.postfixed(self.atom())
        if self.take("^"):
            tree = self.postfixed(Apply("pow", (tree, self.exponent())))
        return tree

    def exponent(self) -> Tree:
        if self.take("-"):
            return Apply("neg", (self.exponent(),))
        if self.take("+"):
            return self.exponent()
        tree = self.atom()
        if self.take("^"):
            tree = Apply("pow", (tree, self.exponent()))
        return tree

    def postfixed(self, tree: Tree) -> Tree:
        while True:
            if self.take("!"):
                tree = Apply("factorial", (tree,))
            elif self.take("\\%"):
                tree = Apply("div", (tree, Number(Fraction(100))))
            elif self.take('"degrees"'):
                tree = Apply("degrees", (tree,))
            else:
                return tree

    def atom(self) -> Tree:
        token = self.peek()
        if not token:
            raise Unreadable("something is missing at the end")
        if token[0].isdigit() or token[0] == ".":
            return self.number(self.tokens.pop())
        self.tokens.pop()
        if token in ("(", "[", "{"):
            tree = self.inside({"(": ")", "[": "]", "{": "}"}[token])
        elif token == "|":
            self.bars += 1
            tree = Apply("abs", (self.sum(),))
            self.bars -= 1
            self.need("|")
        elif token.isalpha():
            tree = self.symbol(token)
        elif token.startswith("\\"):
            tree = self.command(token[1:])
        else:
            raise Unreadable(token)
        return tree

    def inside(self, closing: str) -> Tree:
        """What stands in brackets; bars in it are its own."""
        bars, self.bars = self.bars, 0
        tree = self.sum()
        self.bars = bars
        self.need(closing)
        return tree

    def symbol(self, name: str) -> Tree:
        """A letter with its index and primes."""
        if self.take("_"):
            name += "_" + self.raw()
        while self.take("'"):
            name += "'"
        return Symbol(name)

    def raw(self) -> str:
        """A token or a group, as text."""
        if not self.take("{"):
            return self.tokens.pop() if self.tokens else ""
        depth = 1
        parts: list[str] = []
        while self.tokens:
            token = self.tokens.pop()
            depth += {"{": 1, "}": -1}.get(token, 0)
            if not depth:
                return "".join(parts)
            parts.append(token)
        raise Unreadable("} is missing")

    def number(self, token: str) -> Tree:
        """A number; one followed by a proper fraction of numbers is a mixed number."""
        value = exact(token)
        if self.take("_"):
            raise Unreadable("a number in another base")
        if token.isdigit() and self.peek() == "\\frac":
            left = list(self.tokens)
            self.tokens.pop()
            part = self.fraction()
            if isinstance(part, Number) and 0 < part.value < 1 and self.peek() not in ("^", "!"):
                return Number(value + part.value)
            self.tokens = left
        if self.tokens and (self.peek()[0].isdigit() or self.peek()[0] == "."):
            raise Unreadable("two numbers beside each other")
        return Number(value)

    def argument(self) -> Tree:
        r"""An argument of a LaTeX command: a group, or one digit, letter or command."""
        token = self.peek()
        if token.isdigit():
            self.tokens[-1:] = [token[1:]] if len(token) > 1 else []
            return Number(Fraction(int(token[0])))
        return self.atom() if token and token not in ("+", "-", "*", "/") else self.nothing()

    def nothing(self) -> Tree:
        raise Unreadable("an argument is missing")

    def fraction(self) -> Tree:
        above, below = self.argument(), self.argument()
        if isinstance(above, Number) and isinstance(below, Number) and below.value:
            return Number(above.value / below.value)
        if _is_differential(above) and _is_differential(below):
            raise Unreadable("a derivative")
        return Apply("div", (above, below))

    def command(self, name: str) -> Tree:
        if name == "frac":
            return self.fraction()
        if name == "sqrt":
            return self.root()
        if name == "binom":
            return Apply("binom", (self.argument(), self.argument()))
        if name in GREEK:
            return self.symbol("\\" + name)
        if name in ACCENTS:
            letter = self.raw()
            unit = letter in ("i", "j", "k") and name in ("hat", "vec")
            return self.symbol(letter if unit else f"{name}({letter})")
        if name in FUNCTIONS:
            return self.function(_INVERSE.get(name, name))
        if name in SEVERAL:
            return Apply(name, self.several())
        if name in ("lfloor", "lceil"):
            tree = self.sum()
            self.need("\\rfloor" if name == "lfloor" else "\\rceil")
            return Apply(name[1:], (tree,))
        raise Unreadable("\\" + name)

    def root(self) -> Tree:
        degree: Tree = Number(Fraction(2))
        if self.take("["):
            degree = self.inside("]")
        token = self.peek()
        if token and token[0].isdigit():
            self.tokens.pop()
            return Apply("root", (Number(exact(token)), degree))
        return Apply("root", (self.argument(), degree))

    def several(self) -> tuple[Tree, ...]:
        closing = ")" if self.take("(") else "\\}" if self.take("\\{") else ""
        if not closing:
            self.need("{")
            closing = "}"
        found = [self.sum()]
        while self.take(","):
            found.append(self.sum())
        self.need(closing)
        return tuple(found)

    def function(self, name: str) -> Tree:
        """A function's name is read: its base, its power and its argument, with brackets or without."""
        base: Tree | None = None
        power: Tree | None = None
        for _ in range(2):
            if name == "log" and self.take("_"):
                base = self.argument_or_number()
            elif power is None and self.take("^"):
                power = self.exponent()
        if power == Apply("neg", (Number(Fraction(1)),)) and "arc" + name in FUNCTIONS:
            name, power = "arc" + name, None
        argument = self.argument_of_function()
        tree: Tree = Apply(name, (argument,) if base is None else (argument, base))
        return tree if power is None else Apply("pow", (tree, power))

    def argument_or_number(self) -> Tree:
        token = self.peek()
        if token and token[0].isdigit():
            self.tokens.pop()
            return Number(exact(token))
        return self.argument()

    def argument_of_function(self) -> Tree:
        if self.peek() in ("(", "[", "{", "|"):
            return self.postfixed(self.atom())
        if self.take("-"):
            return Apply("neg", (self.argument_of_function(),))
        tree = self.power()
        while self.starts() and self.peek()[1:] not in FUNCTIONS and self.peek() not in ("(", "[", "{", "|"):
            tree = Apply("mul", (tree, self.power()))
        return tree
