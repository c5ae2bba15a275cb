"""Whether this machine can contain a program, found out by trying."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cache

from realflow.errors import InputError, Problem
from realflow.graph.types import Graph
from realflow.rewards import RUN_CODE
from realflow.rewards.sandbox.inside.job import NOBODY, WAYS
from realflow.rewards.sandbox.limits import Limits
from realflow.rewards.sandbox.process import Contained, SandboxError, Walls

_PROBE = """
import json, os, socket, sys
def blocked(work):
    try:
        work()
    except OSError:
        return True
    return False
outside = sys.argv[1]
print(json.dumps({
    "a file outside": blocked(lambda: open(outside).close()),
    "writing outside": blocked(lambda: open(outside + ".new", "w").close()),
    "sockets": blocked(lambda: socket.socket()),
    "signals to other processes": blocked(lambda: os.kill(int(sys.argv[2]), 0)),
    "its own folder": not blocked(lambda: open("own", "w").close()),
}))
"""
_WORDS = {
    "namespaces": "user, process, network and mount namespaces, and a filter of system calls",
    "landlock": "Landlock, and a filter of system calls",
}


@dataclass(frozen=True)
class Ability:
    """What a machine can do. `walls` is None where it cannot contain programs; `words` say what was found."""

    walls: Walls | None
    words: str


@cache
def check() -> Ability:
    """Find out by running a small program in each way, best first, and seeing what it can reach."""
    if sys.platform != "linux":
        return Ability(None, "this machine cannot contain a program: that takes Linux")
    failed = []
    for walls in ways():
        problem = trial(walls)
        if not problem:
            who = "" if walls.user is None else ", as a user who owns nothing"
            return Ability(walls, f"programs are contained by {_WORDS[walls.way]}{who}")
        failed.append(f"{walls.way}: {problem}")
    return Ability(None, "this machine cannot contain a program: " + "; ".join(dict.fromkeys(failed)))


def ways() -> list[Walls]:
    """What is tried: as nobody where this process is root's (the kernel counts no processes of root's, so
    that a program could start any number of them), then as its own user."""
    if os.geteuid() != 0:
        return [Walls(way) for way in WAYS]
    return [*(Walls(way, NOBODY) for way in WAYS), Walls("namespaces")]


def trial(walls: Walls) -> str:
    """Why programs cannot be contained in this way; empty where they can."""
    with tempfile.TemporaryDirectory(prefix="realflow-outside-") as folder:
        os.chmod(folder, 0o777)  # but for the walls, anyone may read and write here
        file = os.path.join(folder, "file")
        with open(file, "w", encoding="utf-8") as opened:
            os.fchmod(opened.fileno(), 0o666)
        arguments = ["probe.py", file, str(os.getpid())]
        try:
            with Contained(walls, Limits(), arguments, {"probe.py": _PROBE}, quiet=False) as process:
                ended = process.wait()
        except SandboxError as error:
            return str(error)
    try:
        found = json.loads(ended.output)
    except ValueError:
        told = ended.errors.decode(errors="replace").strip().splitlines()[-1:] or [f"status {ended.status}"]
        return f"a small program does not run in it ({told[0]})"
    open_ways = [what for what, closed in found.items() if not closed]
    return f"it leaves open: {', '.join(open_ways)}" if open_ways else ""


def runs_code(graph: Graph) -> list[str]:
    """The calls of a graph that run programs."""
    return [call.name for call in graph.calls if call.decl.name in RUN_CODE]


def uncontained(graph: Graph) -> list[Problem]:
    """A problem for each call of a graph that runs programs, where this machine cannot contain them."""
    calls = runs_code(graph)
    if not calls:
        return []
    try:
        required()
    except InputError as error:
        return [Problem(str(error), f"calls.{call}.use") for call in calls]
    return []


def required() -> Walls:
    """The walls of this machine. Raises InputError where it has none."""
    found = check()
    if found.walls is None:
        raise InputError(
            f"rewards that run code need a sandbox, and {found.words}. Allow unprivileged user namespaces "
            "(kernel.unprivileged_userns_clone=1; in a container, its seccomp profile), or use Linux 6.2 or "
            "later with Landlock"
        )
    return found.walls
