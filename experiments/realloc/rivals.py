"""Other ways to move weights between layouts, for `bench.py`: each does what a good version of it does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import Held, buffers
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from realflow.layout import Box, intersect, lengths
from realflow.realloc import Tensors
from realflow.realloc.schedule import Schedule
from realflow.realloc.storage import Storage

CHUNK = 32 * 2**20  # elements of one broadcast of the gathered model, unless a parameter has more


class Rival(Protocol):
    """Another way to change the layout."""

    def run(self) -> None:
        """Change it."""

    def clean(self) -> None:
        """What is not timed."""


def first_holders(specs: Tensors, name: str) -> dict[Box, int]:
    """Each box of a parameter and the first rank that holds it."""
    found: dict[Box, int] = {}
    for rank, box in specs[name].holders:
        found.setdefault(box, rank)
    return found


class GatherAndBroadcast:
    """Rank 0 gathers the whole model into one buffer and broadcasts it; every rank takes its boxes."""

    def __init__(self, src: Tensors, dst: Tensors, rank: int, read: Held, write: Held) -> None:
        self._rank, self._read, self._write = rank, read, write
        sizes = {name: torch.Size(spec.shape).numel() for name, spec in src.items()}
        self._parts = _parts(sizes)
        room = sum(sizes.values()) if rank == 0 else max(sum(sizes[n] for n in part) for part in self._parts)
        self._flat = torch.empty(room, dtype=torch.bfloat16)
        self._full, at = {}, 0
        for part in self._parts:
            for name in part:
                self._full[name] = self._flat[at : at + sizes[name]].view(src[name].shape)
                at += sizes[name]
            at = at if rank == 0 else 0  # the others have room for one part
        self._pieces = [
            (name, box, holder) for name in src for box, holder in first_holders(src, name).items()
        ]
        self._parcels: dict[int, torch.Tensor] = {}
        for holder in range(1, dist.get_world_size()):
            size = sum(torch.Size(lengths(box)).numel() for _, box, one in self._pieces if one == holder)
            if size and rank in (0, holder):
                self._parcels[holder] = torch.empty(size, dtype=torch.bfloat16)

    def run(self) -> None:
        """One message of each holder to rank 0, then one broadcast in a few parts."""
        if self._rank:
            self._send()
        else:
            self._gather()
        for part in self._parts:
            first, last = self._full[part[0]], self._full[part[-1]]
            start = first.storage_offset()
            dist.broadcast(self._flat[start : last.storage_offset() + last.numel()], 0)
            for name in part:
                for storage in self._write.get(name, ()):
                    storage.view().copy_(_cut(self._full[name], storage.box))

    def clean(self) -> None:
        """Nothing is left behind."""

    def _send(self) -> None:
        if self._rank in self._parcels:
            own = [
                _bound(self._read, name, box) for name, box, holder in self._pieces if holder == self._rank
            ]
            torch.cat([storage.view().reshape(-1) for storage in own], out=self._parcels[self._rank])
            dist.send(self._parcels[self._rank], 0)

    def _gather(self) -> None:
        works = [dist.irecv(parcel, holder) for holder, parcel in self._parcels.items()]
        for name, box, holder in self._pieces:
            if holder == 0:
                _cut(self._full[name], box).copy_(_bound(self._read, name, box).view())
        for work in works:
            assert work is not None
            work.wait()
        at = dict.fromkeys(self._parcels, 0)
        for name, box, holder in self._pieces:
            if holder:
                piece = _cut(self._full[name], box)
                piece.copy_(self._parcels[holder][at[holder] : at[holder] + piece.numel()].view(piece.shape))
                at[holder] += piece.numel()


class BroadcastEach:
    """Each parameter's boxes, from the first replica that has them, to all ranks, one after the other."""

    def __init__(self, src: Tensors, dst: Tensors, rank: int, read: Held, write: Held) -> None:
        self._rank, self._read, self._write = rank, read, write
        self._pieces = [
            (name, box, holder) for name in src for box, holder in first_holders(src, name).items()
        ]
        largest = max(torch.Size(lengths(box)).numel() for _, box, _ in self._pieces)
        self._room = torch.empty(largest, dtype=torch.bfloat16)

    def run(self) -> None:
        """A broadcast, and a copy of what the rank holds of it, for each box."""
        for name, box, holder in self._pieces:
            shape = torch.Size(lengths(box))
            if holder == self._rank:
                piece = _bound(self._read, name, box).view().contiguous()
            else:
                piece = self._room[: shape.numel()].view(shape)
            dist.broadcast(piece, holder)
            for storage in self._write.get(name, ()):
                common = intersect(storage.box, box)
                if common is not None:
                    inside = tuple((a - low, b - low) for (a, b), (low, _) in zip(common, box, strict=True))
                    storage.view(common).copy_(_cut(piece, inside))

    def clean(self) -> None:
        """Nothing is left behind."""


class SaveAndLoad:
    """torch's distributed checkpoint: saved under one layout into memory, loaded under the other."""

    def __init__(self, src: Tensors, dst: Tensors, rank: int, read: Held, write: Held, folder: Path) -> None:
        self._rank, self._folder = rank, folder
        self._saved, self._loaded = _state(read, src), _state(write, dst)

    def run(self) -> None:
        """Save, then load."""
        dcp.save(self._saved, checkpoint_id=self._folder)
        dcp.load(self._loaded, checkpoint_id=self._folder)

    def clean(self) -> None:
        """Remove the files; not part of what is timed."""
        dist.barrier()
        if self._rank == 0:
            shutil.rmtree(self._folder)
        dist.barrier()


class BoxTensor(torch.Tensor):
    """A box of a parameter, as DTensor and ShardedTensor present theirs to the checkpoint."""

    full: torch.Size
    box: Box

    def size(self, *dim: int) -> Any:
        """That of the parameter."""
        return self.full[dim[0]] if dim else self.full

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(low for low, _ in self.box), torch.Size(lengths(self.box)))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        chunk, properties = self._chunk(), TensorProperties.create_from_tensor(self.as_subclass(torch.Tensor))
        index = MetadataIndex(name, chunk.offsets)
        return [
            WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, self.full))
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def _state(held: Held, specs: Tensors) -> dict[str, BoxTensor]:
    found = {}
    for name, bound in held.items():
        for storage in bound:
            tensor = storage.view().as_subclass(BoxTensor)
            tensor.full, tensor.box = torch.Size(specs[name].shape), storage.box
            found[name] = tensor
    return found


class PackedSend:
    """The ceiling: every pair of ranks sends its bytes as one buffer that is packed already, all at once.

    They end in the memory of the destination, from its beginning, and leave nonsense there.
    """

    def __init__(self, schedule: Schedule, rank: int, write: Held) -> None:
        sizes: dict[tuple[int, int], int] = {}
        for transfer in schedule.transfers:
            sizes[transfer.pair] = sizes.get(transfer.pair, 0) + schedule.bytes_of(transfer)
        self._rank = rank
        self._buffers = {}
        at = 0
        for pair, size in sorted(sizes.items()):
            if pair[0] == rank:
                self._buffers[pair] = torch.zeros(size, dtype=torch.uint8)
            elif pair[1] == rank:
                (room,) = buffers(write)
                self._buffers[pair] = room.view(torch.uint8)[at : at + size]
                at += size

    def run(self) -> None:
        """All sends and receives at once."""
        works = [
            dist.isend(buffer, pair[1]) if pair[0] == self._rank else dist.irecv(buffer, pair[0])
            for pair, buffer in self._buffers.items()
        ]
        for work in works:
            assert work is not None
            work.wait()

    def clean(self) -> None:
        """The next way writes over what is there."""


def _parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """Parameters in order, in parts of at most `CHUNK` elements where none alone has more."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > CHUNK:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def _bound(held: Held, name: str, box: Box) -> Storage:
    return next(storage for storage in held[name] if storage.box == box)


def _cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in box)]
