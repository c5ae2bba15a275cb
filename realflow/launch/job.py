"""The processes of one attempt at a run: started, listened to, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from realflow.errors import InputError, RunError
from realflow.observe.progress import Progress
from realflow.runtime.bootstrap import RENDEZVOUS, how_it_ended, start_master
from realflow.runtime.directory import RENDEZVOUS_FILE, remove_partial

PARTING_SECONDS = 5.0
"""How long processes get to leave by themselves once the run has failed."""
FINISH_SECONDS = 60.0
"""How long workers get to leave once the run is complete."""


class Job:
    """The processes of one run and what they say."""

    def __init__(
        self,
        run_dir: Path,
        mpirun: Sequence[str],
        environment: Mapping[str, str],
        start: int,
        checkpoint: Path | None,
    ) -> None:
        self._run_dir, self._mpirun, self._environment = run_dir, mpirun, environment
        self._start, self._checkpoint = start, checkpoint
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._master: subprocess.Popen[bytes] | None = None
        self._workers: subprocess.Popen[bytes] | None = None
        self._rendezvous = run_dir / RENDEZVOUS_FILE
        self._log = run_dir / "workers.log"
        self._doing = "start-up"
        self._over = False

    def start(self) -> None:
        """Start the master, then the workers."""
        with open(self._log, "ab") as log:
            output: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            master = start_master(self._run_dir, events=True, start_step=self._start, **output)
            self._master = master.process
            threading.Thread(target=self._read, args=(master.events,), daemon=True).start()
            descriptor = os.open(self._rendezvous, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(master.rendezvous.to_json())
            command = [*self._mpirun, sys.executable, "-m", "realflow.runtime.worker", str(self._run_dir)]
            command += [str(self._checkpoint)] if self._checkpoint else []
            environment = {**self._environment, RENDEZVOUS: str(self._rendezvous)}
            self._workers = subprocess.Popen(command, env=environment, start_new_session=True, **output)

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._events.put(json.loads(line))
        self._events.put(None)

    def watch(self, progress: Progress | None) -> None:
        """Until the run is complete. Raises RunError when it has failed."""
        assert self._workers is not None
        ended_at: float | None = None
        while True:
            try:
                event = self._events.get(timeout=0.1)
            except queue.Empty:
                if self._workers.poll() is not None:
                    ended_at = ended_at or time.monotonic()
                    if time.monotonic() - ended_at > PARTING_SECONDS:
                        raise RunError(self._unexplained()) from None
                continue
            if event is None or event["kind"] in ("error", "end"):
                self._over = True
            if event is None:
                raise RunError(self._master_died())
            if event["kind"] == "running":
                self._doing = str(event["call"])
            if event["kind"] == "error" and event["code"] == 2:
                raise InputError(str(event["text"]))
            if event["kind"] == "error":
                raise RunError(str(event["text"]) + self._said_by_mpirun())
            if progress is not None:
                progress.update(event)
            if event["kind"] == "end":
                return

    def _master_died(self) -> str:
        assert self._master is not None
        how = how_it_ended(self._master.wait())
        return f"the master {how} during {self._doing}; the workers were told to leave"

    def _unexplained(self) -> str:
        assert self._workers is not None
        return (
            f"the workers ended with code {self._workers.returncode} during {self._doing}"
            f"{self._said_by_mpirun()}\nwhat they printed is in {self._log}"
        )

    def _said_by_mpirun(self) -> str:
        """mpirun's own sentence on which rank ended how, if it wrote one."""
        if self._workers is not None:
            try:
                self._workers.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                return ""
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        told = [
            line.strip()
            for line in lines
            if "noticed that process rank" in line or "exited on signal" in line
        ]
        return "".join(f"\nmpirun: {line}" for line in told[:2])

    def end(self) -> None:
        """Leave no process and no half-written file behind."""
        if self._master is not None and self._master.poll() is None and not self._over:
            self._master.terminate()  # it tells the workers, and writes down that it was interrupted
        complete = self._master is not None and _ends(self._master, 2.0) and self._master.returncode == 0
        for process, patience in ((self._workers, FINISH_SECONDS if complete else 0.5), (self._master, 0.5)):
            if process is not None and not _ends(process, patience):
                _terminate(process)
        self._rendezvous.unlink(missing_ok=True)
        remove_partial(self._run_dir)


def _ends(process: subprocess.Popen[bytes], patience: float) -> bool:
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        return False
    return True


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session of its own, with all in it: politely, then by force."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        if _ends(process, 3.0):
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
