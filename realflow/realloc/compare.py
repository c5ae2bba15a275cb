"""Checksums of what a reallocation moved, compared between its ends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from realflow.errors import InputError, RunError
from realflow.layout import Box, box_size
from realflow.realloc.agree import Works, finish
from realflow.realloc.bound import Bound
from realflow.realloc.messages import within
from realflow.realloc.pack import checksums, move
from realflow.realloc.schedule import Transfer

Received = dict[tuple[int, str, Box], int]
"""(source, name, piece) -> the checksum of the bytes as they arrived."""

Pieces = dict[tuple[int, int], list[tuple[Transfer, Box]]]
"""(source, destination) -> the pieces of its transfers, in an order that both ends find."""


def chosen(name: str, share: float, seed: int) -> bool:
    """Whether a parameter belongs to the sample: about `share` of all, the same on every rank."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def checked(bound: Bound, share: float, seed: int, received: Received) -> int:
    """Compare this rank's pieces with those of the other ends; see `Reallocation.verify`."""
    pieces = _pieces(bound, share, seed)
    scratch = _scratch(bound)
    sums = {
        pair: [_sum(bound, t, box, scratch, received) for t, box in held] for pair, held in pieces.items()
    }
    theirs = _exchanged(bound, sums)
    count = 0
    for pair, values in theirs.items():
        for (transfer, box), there, here in zip(pieces[pair], values, sums[pair], strict=True):
            _compare(transfer, box, there, here)
            count += 1
    if bound.decay is not None:
        return count  # a local average leaves nothing to compare with
    for copy in bound.part.copies:
        if copy.source == bound.rank and chosen(copy.name, share, seed):
            for box in _cuts(bound, copy):
                ends = [_packed(bound, copy, box, scratch, sends=sends) for sends in (True, False)]
                _compare(copy, box, *ends)
                count += 1
    return count


def _scratch(bound: Bound) -> torch.Tensor:
    """A slot of the buckets to pack pieces into."""
    limit = bound.buckets.slot_bytes
    sizes = [bound.part.bytes_of(t) for t in (*bound.part.transfers, *bound.part.copies)]
    return bound.buckets.slots("send", min(limit, max(sizes, default=1)))[0]


def _pieces(bound: Bound, share: float, seed: int) -> Pieces:
    found: Pieces = {}
    for message in bound.messages():
        for name, box in message.pieces:
            if chosen(name, share, seed):
                transfer = Transfer(name, box, message.source, message.destination, message.hop)
                found.setdefault(transfer.pair, []).append((transfer, box))
    return found


def _cuts(bound: Bound, copy: Transfer) -> Iterator[Box]:
    yield from within(copy.box, bound.buckets.slot_bytes // bound.part.itemsizes[copy.name])


def _sum(bound: Bound, transfer: Transfer, box: Box, scratch: torch.Tensor, received: Received) -> int:
    """The checksum of a piece at this rank's end."""
    sends = transfer.source == bound.rank
    if sends or bound.decay is None or transfer.hop:
        return _packed(bound, transfer, box, scratch, sends)
    key = (transfer.source, transfer.name, box)
    if key not in received:
        raise InputError(
            f"{transfer.name}: an average can be verified only by what arrived; call run(record=True) before "
            "verify"
        )
    return received[key]


def _packed(bound: Bound, transfer: Transfer, box: Box, scratch: torch.Tensor, sends: bool) -> int:
    """The checksum of a piece as it lies in storage now, in the dtype in which it travels."""
    launch = bound.packing(transfer.name, box, transfer.hop, sends)
    size = box_size(box) * bound.part.itemsizes[transfer.name]
    move(launch.tensors(), launch.table, [scratch[:size]])
    return checksums(scratch, (0, size))[0]


def _exchanged(bound: Bound, sums: dict[tuple[int, int], list[int]]) -> dict[tuple[int, int], list[int]]:
    """The checksums at the sources of what this rank received."""
    device = bound.buckets.device  # a group of NCCL carries nothing from the CPU
    theirs: dict[tuple[int, int], torch.Tensor] = {}
    works: Works = []
    mine: list[torch.Tensor] = []  # kept until all is sent
    for pair in sorted(sums):
        if pair[0] == bound.rank:
            mine.append(torch.tensor(sums[pair], dtype=torch.int64, device=device))
            works.append((pair[1], dist.isend(mine[-1], pair[1], group=bound.group)))
        else:
            theirs[pair] = torch.empty(len(sums[pair]), dtype=torch.int64, device=device)
            works.append((pair[0], dist.irecv(theirs[pair], pair[0], group=bound.group)))
    finish(bound, works, "while checksums were compared")
    return {pair: values.tolist() for pair, values in theirs.items()}


def _compare(transfer: Transfer, box: Box, there: int, here: int) -> None:
    if there != here:
        raise RunError(
            f"realloc: {transfer.name} {box} differs after its transfer: checksum "
            f"{there & (1 << 64) - 1:016x} on rank {transfer.source}, {here & (1 << 64) - 1:016x} on rank "
            f"{transfer.destination}"
        )
