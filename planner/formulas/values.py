"""What is counted, for what, and what comes out: values. Imports no sympy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward", "recompute", "decode"]
"""forward: whole sequences (inference, prefill, training's forward). backward: gradients of inputs and of
weights, the latter added into a float32 buffer. recompute: backward that first computes the forward again.
decode: one new token for each sequence, keys and values of its context read from the cache."""

PHASES: tuple[Phase, ...] = ("forward", "backward", "recompute", "decode")

Operation = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "p2p"]
Axis = Literal["t", "c", "e", "p", "d", "dc", "ends"]
"""Who communicates: tensor, context and expert ranks, neighbouring stages, data ranks (`dc`: with context
ranks), the first and the last stage."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass computes on one replica (a data-parallel rank with all its t, p and c ranks).

    `tokens`: rows of the products. `pairs`: (query, key) pairs of full causal attention, summed over
    sequences; `windowed` the same for each window of the model, as (window, pairs). In decoding
    `tokens` is the number of sequences, and a sequence of context L (its new token included) has L
    pairs. `sequences`: how many. `context`: tokens read from the cache beside those computed here (a
    prefill that goes on, shared prefixes; decoding's follow from its pairs). `rows`: rows of the head, None:
    `tokens`. Numbers may be fractions (means over a distribution).
    """

    tokens: float
    pairs: float
    sequences: float = 1
    windowed: tuple[tuple[int, float], ...] = ()
    context: float = 0
    rows: float | None = None

    def seen(self, window: int | None) -> float:
        """Pairs of a layer with this window."""
        if window is None:
            return self.pairs
        for known, count in self.windowed:
            if known == window:
                return count
        raise KeyError(f"this pass was not counted for window {window}")

    @property
    def head_rows(self) -> float:
        """Rows that the head computes."""
        return self.tokens if self.rows is None else self.rows


def pairs(length: float, window: int | None = None) -> float:
    """(query, key) pairs of a causal sequence: query i (from 0) sees min(i + 1, window) keys."""
    if window is None or length <= window:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window


def pass_of(
    lengths: Iterable[tuple[float, float]], windows: Iterable[int] = (), *, rows: float | None = None
) -> Pass:
    """The pass over packed sequences: `lengths` are (tokens, how many such sequences)."""
    counted = list(lengths)
    return Pass(
        tokens=sum(length * count for length, count in counted),
        pairs=sum(pairs(length) * count for length, count in counted),
        sequences=sum(count for _, count in counted),
        windowed=tuple(
            (window, sum(pairs(length, window) * count for length, count in counted)) for window in windows
        ),
        rows=rows,
    )


def decode_pass(contexts: Iterable[tuple[float, float]], windows: Iterable[int] = ()) -> Pass:
    """A step of decoding: `contexts` are (tokens that the new token sees, itself included; how many)."""
    counted = list(contexts)
    sequences = sum(count for _, count in counted)
    return Pass(
        tokens=sequences,
        pairs=sum(length * count for length, count in counted),
        sequences=sequences,
        windowed=tuple(
            (window, sum(min(length, window) * count for length, count in counted)) for window in windows
        ),
    )


@dataclass(frozen=True, slots=True)
class Cut:
    """How one replica is divided: tensor, pipeline, context and expert ranks.

    Expert ranks are among the data and context ranks, so `e` does not multiply the ranks of a layout: each
    has `experts / e` of the experts and computes them for the tokens of all `e`. The engine runs t and
    p; c and e are costed only.
    """

    t: int = 1
    p: int = 1
    c: int = 1
    e: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs (a multiply and an add are two), and bytes read from and written to the device's memory."""

    flops: float = 0.0
    read: float = 0.0
    written: float = 0.0

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.read + self.written

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.read + other.read, self.written + other.written)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.read * times, self.written * times)

    __rmul__ = __mul__


@dataclass(frozen=True, slots=True)
class Traffic:
    """`count` messages of one kind in a pass. `bytes` is the size of one: of the whole tensor that is
    reduced, or that has been gathered; what one rank sends and keeps of an all-to-all; a p2p message."""

    operation: Operation
    axis: Axis
    ranks: int
    bytes: float
    count: float = 1

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in all of them (and receives), on a ring or directly."""
        share = {"all_reduce": 2.0, "p2p": 1.0}.get(self.operation, 1.0)
        if self.operation != "p2p":
            share *= (self.ranks - 1) / self.ranks
        return share * self.bytes * self.count
