"""A sandbox for programs that nobody has read: run, tested, and unable to reach anything or to fake a pass.

Two means, each tried out before it is relied on (`Sandbox.check`): namespaces (a file system, processes and
a network of its own) or Landlock; with both a filter of system calls, limits, and a watch over the whole tree
of processes. Where a machine has neither, nothing is run.
"""

from __future__ import annotations

from realflow.rewards.sandbox.ability import Ability, check, required
from realflow.rewards.sandbox.examine import BrokenTests, Verdict, run_program, run_tests
from realflow.rewards.sandbox.limits import Limits
from realflow.rewards.sandbox.process import Ended, SandboxError, Walls

__all__ = [
    "Ability",
    "BrokenTests",
    "Ended",
    "Limits",
    "Sandbox",
    "SandboxError",
    "Verdict",
    "Walls",
    "run_program",
    "run_tests",
]


class Sandbox:
    """What this machine can do to contain programs."""

    @staticmethod
    def check() -> Ability:
        """Whether it can, and how, in words. Found out once in a process, by trying."""
        return check()

    @staticmethod
    def required() -> Walls:
        """The walls of this machine. Raises InputError where it has none."""
        return required()
