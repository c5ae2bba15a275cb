"""Before anything moves: do all ranks mean the same by their messages?

Ranks that cut messages differently, or read the bytes as another dtype, would write nonsense. Both ends
of every pair compare what they mean, and what they find is passed on, so that ranks that stand by
say the same and do not just lose a peer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from realflow.errors import RunError
from realflow.realloc.bound import Bound
from realflow.realloc.messages import Message

Works = list[tuple[int, dist.Work | None]]
"""Messages under way, each with the other rank."""
PASSED_ON = 3
"""How often a verdict is passed on: from partner to partner, to the partner's partners, and once more.
Ranks further away, of which there are few, lose a peer that raises."""


def agree(bound: Bound, messages: Iterable[Message]) -> None:
    """Compare what this rank's messages mean with the ranks at their other ends.

    All ranks of the schedule call it together. Raises RunError that names two ranks that differ, the
    same on both and on all who are near them, or one that was lost.
    """
    mine = {peer: _tensor(bound, [value]) for peer, value in _digests(bound, messages).items()}
    theirs = swapped(bound, mine)
    wrong = [peer for peer, value in theirs.items() if value.item() != mine[peer].item()]
    found = min((_pair(bound.rank, peer) for peer in wrong), default=None)
    for _ in range(PASSED_ON):
        told = swapped(bound, dict.fromkeys(mine, _tensor(bound, found or (-1, -1))))
        heard = [(low, high) for low, high in (pair.tolist() for pair in told.values()) if low >= 0]
        found = min([*heard, *([found] if found else [])], default=None)
    if found is not None:
        raise RunError(
            f"realloc: ranks {found[0]} and {found[1]} do not mean the same messages; the schedule, the "
            "bucket sizes and the dtypes on the way must be the same on both"
        )


def _digests(bound: Bound, messages: Iterable[Message]) -> dict[int, int]:
    """For each partner a number that says what goes both ways, and how."""
    texts: dict[int, list[str]] = {}
    for message in messages:
        sends = message.source == bound.rank
        peer = message.other(bound.rank)
        for name, box in message.pieces:
            stored = bound.end(name, box, message.hop, sends).dtype
            text = (
                f"{message.source} {message.hop} {message.turn} {name} {box} {bound.travels_as(name, stored)}"
            )
            texts.setdefault(peer, []).append(text)
    return {
        peer: int.from_bytes(hashlib.blake2b("\n".join(found).encode(), digest_size=7).digest(), "little")
        for peer, found in texts.items()
    }


def swapped(bound: Bound, mine: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Give each partner a tensor and get its own. All follow one order, as NCCL needs (see `_Exchange`)."""
    theirs = {peer: torch.empty_like(tensor) for peer, tensor in mine.items()}
    works: Works = []
    for pair in sorted(_pair(bound.rank, peer) for peer in mine):
        for source in pair:
            peer = pair[0] if pair[1] == bound.rank else pair[1]
            if source == bound.rank:
                works.append((peer, dist.isend(mine[peer], peer, group=bound.group)))
            else:
                works.append((peer, dist.irecv(theirs[peer], peer, group=bound.group)))
    finish(bound, works, "before anything moved")
    return theirs


def finish(bound: Bound, works: Works, when: str) -> None:
    """Wait for messages. Raises RunError that says which peer was lost, and when."""
    for peer, work in works:
        assert work is not None, "this rank is outside the process group"
        try:
            work.wait()
        except RuntimeError as error:
            raise RunError(
                f"realloc: rank {bound.rank} lost rank {peer} {when}; see the error of that rank: {error}"
            ) from error


def _tensor(bound: Bound, values: Iterable[int]) -> torch.Tensor:
    """Numbers as int64 where the group's transport can carry them."""
    return torch.tensor([*values], dtype=torch.int64, device=bound.buckets.device)


def _pair(one: int, other: int) -> tuple[int, int]:
    return min(one, other), max(one, other)
