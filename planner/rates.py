"""Seconds of work, messages, copies and bookkeeping on one kind of device.

From the catalogue (roofline with an efficiency that grows with the size of the work; alpha-beta for
messages), corrected by a profile where it has measured. Every answer says where it comes from:

    measured      inside what was measured on this machine for this model's shape
    extrapolated  the nearest measurement, scaled by the roofline (other sizes, another shape, more ranks)
    catalogue     from data sheets alone

    rates = make_rates(node, profile=profile_or_None)     # node: realflow.planfile.Node, one for each kind
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from planner.decoder import Decoder
    from planner.formulas import Cut, Pass

Source = Literal["measured", "extrapolated", "catalogue"]
Doing = Literal["infer", "prefill", "forward", "backward", "recompute"]
"""infer: a pass that keeps nothing. prefill: one of the generation engine. forward: one that keeps what the
backward pass needs. backward: gradients, those of weights added into the float32 buffer. recompute:
backward that first computes the forward again."""
Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]

_RANKING: tuple[Source, ...] = ("measured", "extrapolated", "catalogue")


@dataclass(frozen=True, slots=True)
class Seconds:
    """A time, and the least certain source that it rests on. Sums and multiples keep the source."""

    value: float
    source: Source = "measured"

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.value + other.value, worse(self.source, other.source))

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.value * times, self.source)

    __rmul__ = __mul__


def worse(one: Source, other: Source) -> Source:
    """The less certain of two sources."""
    return max(one, other, key=_RANKING.index)


class Rates:
    """Seconds on one kind of device.

    `dtype` is that of the compute weights. `busy` is how many ranks of a node compute at once, this one
    included (they share a CPU's memory bandwidth and caches; a GPU does not care).
    """

    def layer(
        self, decoder: Decoder, kind: int, cut: Cut, one: Pass, doing: Doing, *, dtype: str, busy: int = 1
    ) -> Seconds:
        """One pass through a layer like number `kind` on one rank, with the collectives of its tensor
        group (all of them inside a node)."""
        raise NotImplementedError

    def ends(
        self,
        decoder: Decoder,
        cut: Cut,
        one: Pass,
        doing: Doing,
        *,
        dtype: str,
        busy: int = 1,
        first: bool = True,
        last: bool = True,
    ) -> Seconds:
        """What a pass computes outside its layers: on the `first` stage the embedding, on the `last` one
        final norm, head and log probabilities (values of a value head) of `one.head_rows` tokens. In
        `prefill` nothing but the embedding."""
        raise NotImplementedError

    def decode_layer(
        self, decoder: Decoder, kind: int, cut: Cut, one: Pass, *, dtype: str, busy: int = 1
    ) -> Seconds:
        """One layer of a decoding pass (`decode_pass`). The engine reads, of every slot, as many positions
        as the longest has: give that one's context for all."""
        raise NotImplementedError

    def decode_ends(
        self,
        decoder: Decoder,
        cut: Cut,
        slots: float,
        *,
        dtype: str,
        busy: int = 1,
        last: bool = True,
    ) -> Seconds:
        """What a decoding pass costs beside its layers: the engine's bookkeeping of `slots` samples, and on
        the `last` stage final norm, logits and drawing tokens."""
        raise NotImplementedError

    def update(
        self, elements: float, data: int = 1, *, dtype: str, busy: int = 1, per_node: int | None = None
    ) -> Seconds:
        """An optimizer step after the gradients are there: norm, clipping, AdamW on this rank's part of the
        masters of `elements` parameters, compute weights of all `data` ranks gathered."""
        raise NotImplementedError

    def reduce_gradients(
        self, elements: float, data: int, *, dtype: str, per_node: int | None = None
    ) -> Seconds:
        """By how much reducing the gradients of `elements` parameters over `data` ranks makes a minibatch
        longer, where its backward pass hides nothing of it. (On a CPU it hides next to nothing.)"""
        raise NotImplementedError

    def collective(self, what: Collective, size: float, ranks: int, per_node: int | None = None) -> Seconds:
        """A collective over `ranks`, of which `per_node` share each node (None: all). `size` is the bytes
        of the whole tensor: what is reduced, what has been gathered, what one rank sends and keeps of an
        all-to-all."""
        raise NotImplementedError

    def p2p(self, size: float, *, between: bool = False) -> Seconds:
        """A message of `size` bytes to a rank of the same or (`between`) another node."""
        raise NotImplementedError

    def realloc(self, size: float, *, between: bool = False) -> Seconds:
        """Moving `size` bytes of weights to another rank: packed, sent, unpacked, as the busiest rank
        does it."""
        raise NotImplementedError

    def copy(self, size: float, *, busy: int = 1) -> Seconds:
        """Copying `size` bytes of weights within a rank's memory."""
        raise NotImplementedError

    def host_copy(self, size: float) -> Seconds:
        """Bytes between device and host memory (on a CPU: to memory that is taken anew, and back)."""
        raise NotImplementedError

    def constant(self, name: str) -> Seconds:
        """Seconds of bookkeeping, `CONSTANTS`: `dispatch` (a call's way from master to workers and back),
        `step` (the master's work at the end of a step), `micro_batch` (packing and preparing one),
        `train_step` (counts, metrics and norms of a minibatch), `sample` (what a rollout and the calls
        without a model cost for each sample)."""
        raise NotImplementedError
