"""Which partners of a rank share memory with it, found together before the first message."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from realflow.realloc.agree import swapped
from realflow.realloc.bound import Bound
from realflow.realloc.messages import Message
from realflow.realloc.shared import Home, together


def neighbours(bound: Bound, messages: Iterable[Message]) -> dict[int, torch.Tensor]:
    """The partners that share memory with this rank -> the memory that they send from, uint8.

    All ranks of the schedule call it together. Both ends of a pair decide alike: they are on one machine,
    and each has mapped the other's memory. Where it could not be mapped the pair keeps to its process
    group, and the rank that could not warns (RuntimeWarning). Raises RunError where a peer is lost.
    """
    if bound.buckets.device.type != "cpu":
        return {}
    peers = {message.other(bound.rank) for message in messages}
    own = _home(bound)
    told = swapped(bound, dict.fromkeys(peers, torch.tensor(own.numbers())))
    homes = {peer: Home(*numbers.tolist()) for peer, numbers in told.items()}
    mapped = {}
    for peer in together(own, homes):
        try:
            mapped[peer] = bound.buckets.of(peer, homes[peer])
        except OSError as error:
            _warn(bound.rank, f"has not got the memory of rank {peer}", error)
    both = swapped(bound, {peer: torch.tensor([peer in mapped]) for peer in together(own, homes)})
    return {peer: memory for peer, memory in mapped.items() if both[peer].item()}


def _home(bound: Bound) -> Home:
    try:
        return bound.buckets.home()
    except OSError as error:
        _warn(bound.rank, "has no memory to share", error)
        return Home()


def _warn(rank: int, what: str, error: OSError) -> None:
    warnings.warn(
        f"realloc: rank {rank} {what} ({error}); weights go through sockets between them, which is slower",
        RuntimeWarning,
        stacklevel=2,
    )
