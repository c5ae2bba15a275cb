"""Memory that processes of one machine share: what one packs there, the others unpack from there.

The memory has no name in any file system: it is gone with the last process that has it, however that
one ends, and a small /dev/shm does not limit it. Another process of the same user finds it
through /proc, so that both must see the same processes. Linux alone has both.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

NOWHERE = 0


@dataclass(frozen=True)
class Home:
    """Where a rank keeps the memory that it shares, in whole numbers, as it is told to other ranks.

    `machine` stands for one kernel and one numbering of processes; it is `NOWHERE` where a rank shares
    nothing. `volume`, `inode` and `bytes` tell this memory from what may have taken its place.
    """

    machine: int = NOWHERE
    process: int = 0
    descriptor: int = 0
    volume: int = 0
    inode: int = 0
    bytes: int = 0

    def numbers(self) -> tuple[int, ...]:
        """As int64."""
        return astuple(self)


def together(own: Home, others: Mapping[int, Home]) -> list[int]:
    """The ranks among `others` that can share memory with one whose home is `own`: pure, and the same
    from both sides."""
    return sorted(rank for rank, home in others.items() if home.machine == own.machine != NOWHERE)


def machine_of(device: torch.device) -> int:
    """A number below 2**63 for where this process runs; `NOWHERE` where ranks cannot share memory: their
    tensors are not on the CPU, or the system is not Linux. Raises OSError where /proc is not as usual."""
    if device.type != "cpu" or sys.platform != "linux":
        return NOWHERE
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    text = f"{kernel} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little") + 1


class Segment:
    """Memory of this process that others may map. It takes up what has been written of it."""

    def __init__(self, size: int, machine: int) -> None:
        """Raises OSError where the system has none to give."""
        assert sys.platform == "linux", sys.platform
        descriptor = os.memfd_create("realflow-bucket")
        weakref.finalize(self, os.close, descriptor)
        os.ftruncate(descriptor, size)
        self.memory = _mapped(descriptor, size, mmap.PROT_READ | mmap.PROT_WRITE)
        found = os.fstat(descriptor)
        self.home = Home(machine, os.getpid(), descriptor, found.st_dev, found.st_ino, size)


def attach(home: Home) -> torch.Tensor:
    """The memory of another process, uint8 [bytes], to be read alone: writing to it ends this process. Raises
    OSError where it cannot be had."""
    descriptor = os.open(f"/proc/{home.process}/fd/{home.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if (found.st_dev, found.st_ino, found.st_size) != (home.volume, home.inode, home.bytes):
            raise OSError(f"descriptor {home.descriptor} of process {home.process} is another file")
        return _mapped(descriptor, home.bytes, mmap.PROT_READ)
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, size: int, access: int) -> torch.Tensor:
    """Unmapped when the last tensor on it is gone."""
    mapped = mmap.mmap(descriptor, size, prot=access)
    with warnings.catch_warnings():  # torch has no tensors that cannot be written to, and says so
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(mapped, dtype=torch.uint8)
