"""One contained process: started, fed, read and ended."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from realflow.errors import RunError
from realflow.rewards.sandbox.inside.job import HOME, Job, Way
from realflow.rewards.sandbox.limits import Limits
from realflow.rewards.sandbox.view import environment, interpreter, view

GRACE = 60.0
"""Seconds that a jail may take to be built and cleared away, beside the program's own: the machine may have
other things to do."""


class SandboxError(RunError):
    """The sandbox itself failed; nothing is said of the program."""


@dataclass(frozen=True)
class Walls:
    """How programs are contained: by which means, and as which user (None: as that of this process)."""

    way: Way
    user: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a program ended. `reason` is `exit`, or which limit ended it: `seconds`, `memory`, `disk`,
    `processes`, `output`. `status` is its exit status (negative or above 128: a signal)."""

    reason: str
    status: int
    output: bytes = b""
    errors: bytes = b""


class Contained:
    """A program behind walls, from its start to its end. For use in a `with` statement."""

    def __init__(
        self,
        walls: Walls,
        limits: Limits,
        arguments: Sequence[str],
        files: Mapping[str, str],
        *,
        keep: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        quiet: bool = True,
        harness: bool = False,
    ) -> None:
        """Start it: Python with `arguments`, in a folder that holds `files`. `keep` are descriptors that it
        gets, `quiet` throws away what it prints, `harness` lets it import `inside`."""
        self._folder = tempfile.mkdtemp(prefix="realflow-box-")
        self._limits = limits
        home = HOME if walls.way == "namespaces" else self._folder
        seen = view()
        job = Job(
            way=walls.way,
            argv=interpreter(*arguments),
            env=environment(home, harness=harness),
            scratch=self._folder,
            read_only=seen.read_only,
            links=seen.links,
            files=files,
            seconds=limits.seconds,
            memory=limits.memory,
            disk=limits.disk,
            entries=limits.files,
            processes=limits.processes,
            user=walls.user,
            keep=tuple(keep),
        )
        try:
            self._start(job, stdin, quiet)
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise SandboxError(f"the sandbox could not be started: {error}") from error

    def _start(self, job: Job, stdin: int, quiet: bool) -> None:
        told = os.memfd_create("job")
        os.write(told, job.to_json().encode())
        os.lseek(told, 0, os.SEEK_SET)
        lifeline, self._lifeline = os.pipe()
        self._report, report = os.pipe()
        shown = subprocess.DEVNULL if quiet else subprocess.PIPE
        numbers = (told, lifeline, report)
        started = False
        try:
            self._process = subprocess.Popen(
                [*interpreter("-P", "-m", "inside.jail"), *map(str, numbers)],
                stdin=stdin,
                stdout=shown,
                stderr=shown,
                env={"PYTHONPATH": view().inside},
                pass_fds=(*numbers, *job.keep),
                start_new_session=True,
            )
            started = True
        finally:
            for number in (*numbers, *(() if started else (self._lifeline, self._report))):
                os.close(number)

    def __enter__(self) -> Contained:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        """End it, if it has not ended, and clear its folder away."""
        self.stop()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        os.close(self._report)
        _remove(self._folder)

    def stop(self) -> None:
        """Have the jail end all of its processes."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def wait(self) -> Ended:
        """Wait for the end, reading what it prints up to the limit. Raises SandboxError where the walls could
        not be built, or the jail itself died."""
        parts: dict[int, bytearray] = {}
        with selectors.DefaultSelector() as selector:
            for pipe in (self._process.stdout, self._process.stderr, self._report):
                if pipe is not None:
                    number = pipe if isinstance(pipe, int) else pipe.fileno()
                    parts[number] = bytearray()
                    selector.register(number, selectors.EVENT_READ)
            flooded = self._read(selector, parts)
        report = bytes(parts.pop(self._report))
        output, errors = (bytes(part[: self._limits.output]) for part in (*parts.values(), b"", b"")[:2])
        found = _reported(report)
        if "failed" in found:
            raise SandboxError(f"the sandbox could not be built: {found['failed']}")
        return Ended("output" if flooded else str(found["reason"]), int(found["status"]), output, errors)

    def _read(self, selector: selectors.BaseSelector, parts: Mapping[int, bytearray]) -> bool:
        """Read until all pipes are closed; whether more came than may."""
        deadline = time.monotonic() + self._limits.seconds + GRACE
        flooded = False
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                raise SandboxError("the sandbox did not end its program in time")
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                elif len(parts[key.fd]) <= self._limits.output:
                    parts[key.fd] += chunk
                else:
                    flooded = True
                    self.stop()
        return flooded


def _reported(report: bytes) -> dict[str, Any]:
    try:
        found = json.loads(report)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SandboxError("the sandbox's own process died")
    return found


def _remove(folder: str) -> None:
    """Remove a scratch folder, also where the program left folders in it that cannot be entered."""

    def open_up(function: Any, path: str, _: Any) -> None:
        parent = os.path.dirname(path)
        for each in (parent, path):
            if os.path.isdir(each) and not os.path.islink(each) and each.startswith(folder):
                os.chmod(each, 0o700)
        function(path)

    try:
        shutil.rmtree(folder, onerror=open_up)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
