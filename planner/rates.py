"""Seconds of work, messages, copies and bookkeeping on one kind of device.

From the catalogue (roofline with an efficiency that grows with the size of the work; alpha-beta for
messages), corrected by a profile where it has measured. Every answer says where it comes from:

    measured      inside what was measured on this machine for this model's shape
    extrapolated  the nearest measurement, scaled by the roofline (other sizes, another shape, more ranks)
    catalogue     from data sheets alone

    rates = make_rates(device, cluster_node, ranks_per_node=2, profile=profile)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from planner.decoder import Decoder
    from planner.formulas import Cut, Pass

Source = Literal["measured", "extrapolated", "catalogue"]
Phase = Literal["forward", "train", "recompute"]
"""Inference or prefill; forward and backward; forward, forward again and backward."""
Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"]

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
    """Seconds on one kind of device. `busy` is how many ranks of a node compute at once (they share a
    CPU's memory bandwidth and caches; a GPU does not care), this one included."""

    def layer(
        self, decoder: Decoder, kind: int, cut: Cut, one: Pass, phase: Phase, *, dtype: str, busy: int = 1
    ) -> Seconds:
        """One pass through decoder layer number `kind` on one rank, with the collectives of its tensor
        group (all of them inside a node); in training with what adds its gradients into their buffer."""
        raise NotImplementedError

    def embedding(
        self, decoder: Decoder, cut: Cut, one: Pass, phase: Phase, *, dtype: str, busy: int = 1
    ) -> Seconds:
        """The first stage's part before its layers."""
        raise NotImplementedError

    def head(
        self, decoder: Decoder, cut: Cut, rows: int, phase: Phase, *, dtype: str, busy: int = 1
    ) -> Seconds:
        """The last stage's part after its layers: final norm, logits, and log probabilities (a value head:
        values) of `rows` tokens."""
        raise NotImplementedError

    def decode_layer(
        self, decoder: Decoder, kind: int, cut: Cut, slots: int, context: float, *, dtype: str, busy: int = 1
    ) -> Seconds:
        """One layer of a decoding pass: a new token for each of `slots` sequences of `context` tokens."""
        raise NotImplementedError

    def decode_ends(self, decoder: Decoder, cut: Cut, slots: int, *, dtype: str, busy: int = 1) -> Seconds:
        """What a decoding pass does beside its layers: embedding, final norm, logits, drawing tokens, and
        the engine's bookkeeping of `slots` samples."""
        raise NotImplementedError

    def optimizer(self, elements: int, *, dtype: str, busy: int = 1) -> Seconds:
        """Norm, clipping, AdamW on `elements` masters of this rank and writing them into its compute
        weights of `dtype` (the gathering over data ranks is a collective of its own)."""
        raise NotImplementedError

    def collective(self, what: Collective, size: float, ranks: int, per_node: int | None = None) -> Seconds:
        """A collective over `ranks`, of which `per_node` share each node (None: all). `size` is the bytes
        of the whole tensor: what is reduced, what has been gathered, what one rank sends and keeps of an
        all-to-all."""
        raise NotImplementedError

    def p2p(self, size: float, *, between: bool = False) -> Seconds:
        """A message of `size` bytes to a rank of the same or (`between`) another node."""
        raise NotImplementedError

    def host_copy(self, size: float) -> Seconds:
        """Bytes between device and host memory."""
        raise NotImplementedError

    def pack(self, size: float, *, busy: int = 1) -> Seconds:
        """Gathering `size` bytes of strided weights into buckets, or scattering them from there."""
        raise NotImplementedError

    def constant(self, name: str) -> Seconds:
        """Seconds of bookkeeping: `dispatch` (a call's way from master to workers and back),
        `micro_batch` (packing and preparing one), `train_step` (counts, metrics and norms of an optimizer
        step), `infer_call`, `sample` (per sample that a rollout hands in), `decode_pass`."""
        raise NotImplementedError
