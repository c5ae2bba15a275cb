"""What the seconds of a model's call depend on, but for its samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from planner.adapters import BACKWARD, FORWARD, decoder_low
from planner.costs.stages import StageRun
from planner.decoder import Decoder
from planner.formulas import Cut, Pass, stage_elements, stage_traffic
from planner.formulas.values import Phase
from planner.loads import How
from planner.rates import Doing, Rates, Seconds
from realflow.graph.types import Call, LoraSpec
from realflow.models.card import ITEMSIZE

NOT_RUN = "{call}: layout letter {letter} is costed, but the engine cannot run it yet"

LESS = "{call}: passes with adapters take {forward} (forward) and {backward} (backward) of those without"


@dataclass(frozen=True)
class Setting:
    """A call, how it runs, the model, and what the devices do in a second."""

    call: Call
    how: How
    decoder: Decoder
    cut: Cut
    stages: tuple[StageRun, ...]
    rates: Rates
    dtype: str
    per_node: int
    """Devices of a node."""
    read_bytes: float = 0.0
    """Of each token, in the fields that the call reads from other calls."""
    lora: LoraSpec | None = None
    """Of the model: its adapters alone are trained."""

    @property
    def itemsize(self) -> int:
        """Bytes of a weight or activation."""
        return ITEMSIZE[self.dtype]

    @property
    def ranks(self) -> int:
        """Ranks of the call."""
        return self.how.layout.size * self.cut.c

    @property
    def data_per_node(self) -> int:
        """Ranks of a data group that share a node (a mesh is ordered pp, dp, tp)."""
        inner = self.cut.t * self.cut.c
        return max(1, min(self.how.layout.dp, self.per_node // inner))

    @property
    def apart(self) -> bool:
        """Whether neighbouring stages lie on different nodes."""
        return self.how.layout.dp * self.cut.t * self.cut.c >= self.per_node

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What is taken for granted about how the call runs."""
        letters = [letter for letter, size in (("c", self.cut.c), ("e", self.cut.e)) if size > 1]
        found = [NOT_RUN.format(call=self.call.name, letter=letter) for letter in letters]
        if self.lora is not None and self.call.op == "train":
            found.append(LESS.format(call=self.call.name, forward=FORWARD, backward=BACKWARD))
        return tuple(found)

    def trained(self, run: StageRun) -> int:
        """Elements that a rank of a stage trains."""
        if self.lora is not None:
            return decoder_low(self.decoder, self.cut, run.first, run.stop, self.lora).stored
        return stage_elements(self.decoder, self.cut, run.first, run.stop)

    def shared(self, seconds: Callable[[int], Seconds], at_once: float = 1.0) -> Seconds:
        """Seconds of something that depends on how many ranks of a node are busy: of a pipeline's stages
        the fraction `at_once` is. Between two whole numbers of ranks it is read off a line."""
        if self.rates.device.runtime != "cpu":  # a GPU has what it needs to itself
            return seconds(1)
        most = min(self.per_node, self.ranks)
        busy = min(float(most), max(1.0, most * at_once))
        low = math.floor(busy)
        if busy == low:
            return seconds(low)
        return seconds(low) * (low + 1 - busy) + seconds(low + 1) * (busy - low)

    def stage_pass(self, run: StageRun, one: Pass, doing: Doing, busy: int) -> Seconds:
        """A pass over a micro-batch on one rank of a stage."""
        total = Seconds(0.0)
        for kind, count in run.kinds:
            layer = self.rates.layer(self.decoder, kind, self.cut, one, doing, dtype=self.dtype, busy=busy)
            total += layer * count
        if run.embeds or run.ends:
            total += self.rates.ends(
                self.decoder,
                self.cut,
                one,
                doing,
                dtype=self.dtype,
                busy=busy,
                first=run.embeds,
                last=run.ends,
            )
        return total

    def decode_pass(self, run: StageRun, one: Pass, busy: int) -> Seconds:
        """A pass of decoding on one rank of a stage."""
        total = self.rates.decode_ends(
            self.decoder, self.cut, one.sequences, dtype=self.dtype, busy=busy, last=run.ends
        )
        for kind, count in run.kinds:
            layer = self.rates.decode_layer(self.decoder, kind, self.cut, one, dtype=self.dtype, busy=busy)
            total += layer * count
        return total

    def fetched(self, tokens: float) -> Seconds:
        """A replica's fields, which lie on all ranks of the call that wrote them: what is not here comes from
        them, before the call computes."""
        if self.ranks == 1:
            return Seconds(0.0)
        size = self.read_bytes * tokens * (1 - 1 / self.ranks)
        return self.rates.p2p(size, between=self.ranks > self.per_node)

    def crossing(self, one: Pass, phase: Phase) -> Seconds:
        """The hidden states of a pass, from a stage to the next."""
        if self.cut.p == 1:
            return Seconds(0.0)
        traffic = stage_traffic(self.decoder, self.cut, one, phase, self.itemsize)
        return self.rates.p2p(traffic.bytes, between=self.apart)
