"""Generate dispatches under way: which prompts go to which replica, and when. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from realflow.graph.types import Call
from realflow.planfile import CallPlan
from realflow.runtime.dispatches import replica_of, replicas
from realflow.runtime.events import To
from realflow.runtime.messages import Drain, Feed


@dataclass
class _Stream:
    """A generate dispatch: prompts not yet fed, how many samples each replica still owes, and how many
    `samples` a prompt has."""

    waiting: list[int]
    outstanding: dict[int, int]
    samples: int
    drained: bool = False


class Feeding:
    """The streams of generate dispatches, by the name of the dispatch."""

    def __init__(self, calls: Mapping[str, CallPlan]) -> None:
        self._calls = calls
        self._streams: dict[str, _Stream] = {}

    def __contains__(self, dispatch: str) -> bool:
        return dispatch in self._streams

    def open(self, dispatch: str, call: Call, ids: Sequence[int]) -> list[To]:
        """A dispatch of these samples has begun; returns the first feeds."""
        groups = sorted({sample // call.samples for sample in ids})
        speakers = replicas(self._calls[call.name])
        self._streams[dispatch] = _Stream(groups, dict.fromkeys(speakers, 0), call.samples)
        return self._feed(dispatch, call.name)

    def ready(self, dispatch: str, call: str, rank: int, count: int) -> list[To]:
        """A replica has finished `count` samples; returns what it gets in their place."""
        self._streams[dispatch].outstanding[rank] -= count
        return self._feed(dispatch, call)

    def close(self, dispatch: str) -> None:
        """A dispatch has ended, if it was one of these."""
        self._streams.pop(dispatch, None)

    def _feed(self, dispatch: str, call: str) -> list[To]:
        """Give waiting prompts to the replicas that owe the least; one group beyond full slots each."""
        stream, where = self._streams[dispatch], self._calls[call]
        given: dict[int, list[int]] = {}
        while stream.waiting:
            rank = min(stream.outstanding, key=lambda r: (stream.outstanding[r], r))
            if stream.outstanding[rank] >= where.slots + stream.samples:
                break
            given.setdefault(rank, []).append(stream.waiting.pop(0))
            stream.outstanding[rank] += stream.samples
        sent = [
            To(member, Feed(dispatch, groups))
            for rank, groups in given.items()
            for member in replica_of(where, rank)
        ]
        if not stream.waiting and not stream.drained:
            stream.drained = True
            sent += [To(rank, Drain(dispatch)) for rank in where.ranks]
        return sent
