"""What a contained program may use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one run. `seconds` are of the wall clock; `memory` (bytes) is the address space of each
    process and what all of them together hold; `disk` (bytes) and `files` are what it may write, `output`
    (bytes) what it may print; `processes` counts threads too."""

    seconds: float = 10.0
    memory: int = 1 << 30
    disk: int = 64 << 20
    files: int = 1000
    output: int = 1 << 20
    processes: int = 32
