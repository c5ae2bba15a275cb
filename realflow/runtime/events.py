"""What goes into the master's core and what comes out of it, beside the workers' own messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from realflow.planfile.holdings import Edge
from realflow.runtime.carried import Carried
from realflow.runtime.messages import DispatchDone, Failed, Message, Ready, SampleReady

# ---- events of the shell ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker's process is gone, or silent for too long."""

    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; deadlines are looked at."""


Event = Ready | SampleReady | DispatchDone | Failed | WorkerLost | Tick


# ---- instructions -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class To:
    """Send `message` to `rank`."""

    rank: int
    message: Message


@dataclass(frozen=True, slots=True)
class Prepare:
    """An edge is about to be used for the first time: its ranks need their slices of its schedule."""

    edge: Edge


@dataclass(frozen=True, slots=True)
class StepDone:
    """All calls of a step have ended, at `ended`, and models that follow at its end have followed.
    `metrics` are those that only the core knows."""

    step: int
    started: float
    ended: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Saved:
    """All ranks have written their part of the checkpoint of `step`: it can get its final name."""

    step: int
    files: Mapping[str, str]
    carried: Carried


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is complete."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The run has failed; `text` says what, where, and what the others were doing. `refused`: the
    input is wrong, and nothing was run."""

    text: str
    refused: bool = False


Instruction = To | Prepare | StepDone | Saved | Finished | Abort
