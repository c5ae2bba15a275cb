"""Decode steps over tensors that stay where they are, so that CUDA graphs can repeat them.

A step without prefixes is the same sequence of kernels each time but for its sizes: those are rounded
up to few (`rows_of`, `length_of`), and for each pair there is one `Frame` of input tensors, computed
on as a whole. On CUDA its kernels are captured at first use and replayed from then on, which spares
the host one launch for each of them. Steps that prefill run as they are.

The same frames run without capture on any device, and are tested so; that everything in them can be
captured (no data goes to the host, every call makes the same kernels) is tested on a CPU as well.
Capture itself has not been run yet: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from realflow.engines.decode import Decoder
from realflow.engines.fused import FusedDecoder
from realflow.engines.kv_cache import KVCache
from realflow.engines.part import Heads
from realflow.engines.passes import Pass

_SPAN = 256  # tokens by which the lengths of frames differ


def rows_of(count: int, room: int) -> int:
    """Rows of the frame for `count` sequences: a power of two up to 8, then a multiple of 8, in `room`."""
    return min(room, 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8)


def length_of(longest: int, room: int) -> int:
    """Positions that the frame for sequences of up to `longest` tokens reads, of `room` in a slot."""
    return min(room, -(-longest // _SPAN) * _SPAN)


class StaticPass(Pass):
    """A pass of the rows of slots `[first, first + rows)` that is filled again for each step.

    Rows beyond the step's own belong to free slots: they are sequences of one token, whose keys and
    values go to a slot's last position, which no prefix that a slot keeps can reach.
    """

    def __init__(self, cache: KVCache, heads: Heads, first: int, rows: int, longest: int) -> None:
        self.cache, self.heads, self.first = cache, heads, first
        self.slots, self.longest, self.prefixes = rows, longest, ()
        self.tokens, self.positions, self.lengths, self._places = (
            torch.zeros(rows, dtype=torch.int64, device=cache.device) for _ in range(4)
        )
        self._slot_ids = torch.arange(first, first + rows, device=cache.device)
        self._shortest = 0

    def fill(self, step: Pass) -> None:
        """Take the rows of a step that has no prefixes."""
        count = step.slots
        for mine, theirs, spare in (
            (self.tokens, step.tokens, 0),
            (self.positions, step.positions, 0),
            (self.lengths, step.lengths, 1),
            (self._places, step.positions, self.cache.shape.length - 1),
        ):
            mine[:count].copy_(theirs)
            mine[count:].fill_(spare)

    def begin(self) -> None:
        """What a step derives from its inputs before the first layer; a part of the graph."""
        self._begin(self._slot_ids, self._places)


class Frame:
    """One size of step: inputs, and the graph that turns them into `output`."""

    def __init__(self, decoder: Decoder, static: StaticPass, hidden: torch.Tensor | None) -> None:
        self.static, self.hidden = static, hidden
        self._decoder = decoder
        self._graph: torch.cuda.CUDAGraph | None = None
        self.output: torch.Tensor | None = None

    def fill(self, step: Pass, hidden: torch.Tensor | None) -> None:
        """Take a step's inputs."""
        self.static.fill(step)
        if self.hidden is not None and hidden is not None:
            self.hidden[: len(hidden)].copy_(hidden)
            self.hidden[len(hidden) :].zero_()

    def compute(self) -> torch.Tensor:
        """The step on the inputs at hand: what is captured."""
        self.static.begin()
        return self._decoder(self.static, None if self.hidden is None else self.hidden.clone())

    def replay(self, pool: Any) -> torch.Tensor:
        """`compute`, captured at the first call. The result is overwritten by the next replay of any
        graph of `pool` (`torch.cuda.graph_pool_handle`)."""
        if self._graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries get ready outside the graph; a step can be repeated
                self.compute()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self.output = self.compute()
        self._graph.replay()
        assert self.output is not None
        return self.output


class StaticDecoder:
    """A `FusedDecoder` that makes steps without prefixes in frames."""

    def __init__(self, decoder: FusedDecoder, groups: Sequence[range], *, capture: bool) -> None:
        """`groups` are the slots that passes are made of (`Slots.groups`); `capture` needs CUDA."""
        self.frames: dict[tuple[int, int, int], Frame] = {}
        self._decoder, self._capture = decoder, capture
        self._room = {slots[0]: len(slots) for slots in groups}
        self._seen: tuple[KVCache, int] | None = None
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    def __call__(self, step: Pass, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """See `Decoder`."""
        if step.prefixes:
            return self._decoder(step, hidden)
        frame = self._frame(step, hidden)
        frame.fill(step, hidden)
        output = frame.replay(self._pool) if self._capture else frame.compute()
        return output[: step.slots].clone()  # the frame's own is written again by the next step

    def _frame(self, step: Pass, hidden: torch.Tensor | None) -> Frame:
        self._decoder.refresh()
        seen = step.cache, self._decoder.address
        if self._seen is None or self._seen[0] is not seen[0] or self._seen[1] != seen[1]:
            self.frames.clear()  # they read weights and cache where these were
            self._seen = seen
        rows = rows_of(step.slots, self._room[step.first])
        longest = length_of(step.longest, step.cache.shape.length)
        key = step.first, rows, longest
        if key not in self.frames:
            static = StaticPass(step.cache, step.heads, step.first, rows, longest)
            room = None if hidden is None else hidden.new_zeros(rows, hidden.shape[1])
            self.frames[key] = Frame(self._decoder, static, room)
        return self.frames[key]


def with_graphs(decoder: Decoder, groups: Sequence[range], device: torch.device) -> Decoder:
    """The decoder, its steps captured in CUDA graphs where the device has them and the layers are known."""
    if device.type == "cuda" and isinstance(decoder, FusedDecoder):
        return StaticDecoder(decoder, groups, capture=True)
    return decoder
