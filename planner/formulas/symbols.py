"""The symbols of the formulas, and what they mean for a layout. Imports sympy.

Numbers of heads and columns are those of the busiest rank: where they do not divide by t, some ranks have
one more than others.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp


def _symbols(names: str) -> tuple[sp.Symbol, ...]:
    return tuple(sp.symbols(names, positive=True))


n, y, s, m, r, b = _symbols("n y s m r b")
H, D, h, g, u = _symbols("H D h g u")
F, S, X, E, L, k, e = _symbols("F S X E L k e")
V = sp.Symbol("V", positive=True)

RUNTIME = (n, y, s, m, r)
"""What follows from the pass; the other arguments follow from model and cut alone."""

SHARES = (b, H, D, h, g, u, F, S, X, E, L, k, e, V)

tokens, pairs, context, head_rows = _symbols("tokens pairs context head_rows")
heads, kv_heads, intermediate, shared, expert, experts, vocab = _symbols(
    "heads kv_heads intermediate shared_columns expert_columns experts vocab"
)
t, c, p, d = _symbols("t c p d")


@dataclass(frozen=True)
class Meaning:
    """What a symbol stands for, and its value for a layout where that can be written down."""

    text: str
    value: sp.Expr | None = None


def meanings(*, sequence_parallel: bool = False, decode: bool = False) -> dict[sp.Symbol, Meaning]:
    """Symbol -> its meaning in a pass (in decoding context ranks divide what is read, not the tokens)."""
    mine = tokens if decode else tokens / c
    return {
        n: Meaning("tokens that a rank computes", mine),
        y: Meaning("tokens of a rank between its blocks", mine / t if sequence_parallel else mine),
        s: Meaning("pairs of a query and a key that it sees, within the layer's window", pairs / c),
        m: Meaning("tokens read from the cache beside those computed", context / c),
        r: Meaning("rows of the head", head_rows if decode else head_rows / c),
        b: Meaning("bytes of a weight or activation"),
        H: Meaning("hidden size"),
        D: Meaning("size of a head"),
        h: Meaning("query heads of a rank", sp.ceiling(heads / t)),
        g: Meaning(
            "key and value heads that a rank holds: all of them where they do not divide by t",
            sp.Piecewise((kv_heads / t, sp.Eq(sp.Mod(kv_heads, t), 0)), (kv_heads, True)),
        ),
        u: Meaning("key and value heads that a rank's query heads use, and that are cached"),
        F: Meaning("columns of the MLP of a rank", sp.ceiling(intermediate / t)),
        S: Meaning("columns of the experts that every token uses, of a rank", sp.ceiling(shared / t)),
        X: Meaning("columns of an expert of a rank", sp.ceiling(expert / t)),
        E: Meaning("experts", experts),
        L: Meaning("experts of a rank", sp.ceiling(experts / e)),
        k: Meaning("experts that a token uses"),
        e: Meaning("ranks that divide the experts among them"),
        V: Meaning("token ids of a rank", sp.ceiling(vocab / t)),
    }
