"""Rates that follow the formulas alone: a device without surprises, for tests of what is counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from planner.decoder import Decoder
from planner.formulas import Cut, Pass, ends_work, layer_work
from planner.hardware import node_device
from planner.rates import Collective, Doing, Rates, Seconds
from realflow.planfile import Node

FLOPS, BYTES, LINK = 1e9, 1e9, 1e8
CONSTANT = 1e-4


@dataclass
class FlatRates(Rates):
    """`asked` lists what was asked for, to tell what a cost looked at."""

    kind: str = "cpu"
    asked: list[tuple[str, object]] = field(default_factory=list)
    slower: float = 0.0
    """By how much each further busy rank slows a rank down."""

    def __post_init__(self) -> None:
        self.device = node_device(Node("node", 8, self.kind))

    def layer(
        self, decoder: Decoder, kind: int, cut: Cut, one: Pass, doing: Doing, *, dtype: str, busy: int = 1
    ) -> Seconds:
        self.asked.append((doing, one))
        phase = doing if doing in ("backward", "recompute") else "forward"
        work = layer_work(decoder, kind, cut, one, phase)
        return self._seconds(work.flops, busy)

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
        phase = doing if doing in ("backward", "recompute") else "forward"
        work = ends_work(decoder, cut, one, phase)
        parts = [name for name in work if (first if name == "embedding" else last and doing != "prefill")]
        return self._seconds(sum(work[name].flops for name in parts), busy)

    def decode_layer(
        self, decoder: Decoder, kind: int, cut: Cut, one: Pass, *, dtype: str, busy: int = 1
    ) -> Seconds:
        return self._seconds(layer_work(decoder, kind, cut, one, "decode").bytes, busy)

    def decode_ends(
        self, decoder: Decoder, cut: Cut, slots: float, *, dtype: str, busy: int = 1, last: bool = True
    ) -> Seconds:
        return self._seconds(decoder.head_size / cut.t if last else 0.0, busy)

    def update(
        self, elements: float, data: int = 1, *, dtype: str, busy: int = 1, per_node: int | None = None
    ) -> Seconds:
        return self._seconds(16 * elements / data, busy)

    def reduce_gradients(
        self, elements: float, data: int, *, dtype: str, per_node: int | None = None
    ) -> Seconds:
        return Seconds(4 * elements / LINK * (data - 1) / data)

    def collective(self, what: Collective, size: float, ranks: int, per_node: int | None = None) -> Seconds:
        return Seconds(size / LINK * (ranks - 1) / ranks)

    def p2p(self, size: float, *, between: bool = False) -> Seconds:
        return Seconds(size / LINK * (4 if between else 1))

    def realloc(self, size: float, *, between: bool = False) -> Seconds:
        return self.p2p(size, between=between)

    def copy(self, size: float, *, busy: int = 1) -> Seconds:
        return Seconds(size / BYTES)

    def host_copy(self, size: float) -> Seconds:
        return Seconds(size / BYTES)

    def constant(self, name: str) -> Seconds:
        return Seconds(CONSTANT)

    def _seconds(self, work: float, busy: int) -> Seconds:
        return Seconds(work / FLOPS * (1 + self.slower * (busy - 1)))
