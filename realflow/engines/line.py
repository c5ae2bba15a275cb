"""What the stages of a pipeline hand to each other while they generate.

Hidden states go up, from a stage to the next one; what the last stage has drawn goes back to all
others, along the same tensor rank. Every rank makes the same passes in the same order, each stage
after the one before it, and no rank waits for its own messages to arrive: a `Flight` is a pass whose
tokens are still to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from realflow.engines.samples import Sample
from realflow.models.place import Axis


@dataclass(eq=False)
class Flight:
    """A pass that has left this stage: its samples, from slot `first` on, and the weights' version.

    `drawn` float64 [B, 2] will hold token and log probability of each; `works` are the transfers under
    way, their tensors kept until they are done.
    """

    samples: Sequence[Sample]
    first: int
    version: int
    drawn: torch.Tensor
    works: list[tuple[dist.Work, torch.Tensor]]

    def land(self) -> tuple[list[int], list[float]]:
        """Wait for tokens and log probabilities. All stages have then made the pass, so that whatever
        this one has sent for it was received."""
        for work, _ in self.works:
            work.wait()
        self.works.clear()
        tokens, logprobs = self.drawn.unbind(-1)
        return [int(token) for token in tokens.tolist()], logprobs.tolist()


class Line:
    """The pipeline of one tensor rank of a replica."""

    def __init__(self, pp: Axis, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Hidden states have `width` numbers of `dtype` a row."""
        self._pp, self._width, self._dtype, self._device = pp, width, dtype, device

    def receive(self, rows: int) -> torch.Tensor | None:
        """The hidden states [rows, width] of the stage before; None on the first stage."""
        if self._pp.index == 0:
            return None
        hidden = torch.empty(rows, self._width, dtype=self._dtype, device=self._device)
        dist.recv(hidden, group=self._pp.group, group_src=self._pp.index - 1)
        return hidden

    def send(self, hidden: torch.Tensor, flight: Flight) -> None:
        """Hand hidden states on to the next stage."""
        flight.works.append(self._send(hidden.contiguous(), self._pp.index + 1))

    def announce(self, flight: Flight) -> None:
        """From the last stage: `flight.drawn` to all others."""
        flight.works.extend(self._send(flight.drawn, stage) for stage in range(self._pp.size - 1))

    def expect(self, flight: Flight) -> None:
        """On all other stages: what the last one will draw."""
        work = dist.irecv(flight.drawn, group=self._pp.group, group_src=self._pp.size - 1)
        assert work is not None
        flight.works.append((work, flight.drawn))

    def _send(self, data: torch.Tensor, stage: int) -> tuple[dist.Work, torch.Tensor]:
        work = dist.isend(data, group=self._pp.group, group_dst=stage)
        assert work is not None
        return work, data
