"""A worker: one process for each device. Executes what the master orders, in its order.

    python -m realflow.runtime.worker RUN_DIR [CHECKPOINT]        (started by mpirun)

Threads: the main one computes (models, collectives); `functions` runs calls without a model, so
that rewards are counted while the rollout goes on; `link` talks to the master; a field server
gives other workers what they need; `fetch` gets what this one needs.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from realflow.errors import InputError, RealFlowError
from realflow.planfile import Plan, read_plan, run_problems
from realflow.runtime.bootstrap import RENDEZVOUS, Identity, Mpi, Start, is_first, meet, start_master
from realflow.runtime.connect import Rendezvous
from realflow.runtime.directory import prepare


def main(plan_path: Path, run_dir: Path) -> int:
    """A worker under a bare `mpirun -n N realflow run plan.yaml`: rank 0 also starts the master."""
    die_with_parent()
    plan = read_plan(plan_path, run_problems)
    return _edge(plan, run_dir, lambda: _with_master(plan, run_dir))


def supervised(run_dir: Path, checkpoint: Path | None = None) -> int:
    """A worker under the supervisor, which has started the master."""
    die_with_parent()
    return _edge(read_plan(run_dir / "plan.yaml"), run_dir, _left_by_supervisor, checkpoint)


def _with_master(plan: Plan, run_dir: Path) -> Start:
    prepare(plan, run_dir)
    try:
        master = start_master(run_dir, events=False)
    except InputError:
        shutil.rmtree(run_dir)
        raise

    def stop() -> None:  # refused before anything was run: the place is left as it was
        master.process.terminate()
        master.process.wait()
        shutil.rmtree(run_dir)

    return Start(master.rendezvous, stop=stop)


def _left_by_supervisor() -> Start:
    path = Path(os.environ[RENDEZVOUS])
    rendezvous = Rendezvous.from_json(path.read_text())
    path.unlink()
    return Start(rendezvous)


def die_with_parent() -> None:
    """Ask the kernel to end this process when mpirun is killed and cannot do it itself (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _edge(plan: Plan, run_dir: Path, begin: Callable[[], Start], checkpoint: Path | None = None) -> int:
    """The process's edge: whatever is raised inside is reported once, and ends the whole job.

    `begin` is called on MPI's rank 0 alone, before MPI is initialised.
    """
    start = Start()
    if is_first():
        try:
            start = begin()
        except InputError as error:
            start = Start(refusal=str(error))
    mpi = Mpi()
    identity: Identity | None = None
    try:
        identity = meet(plan.cluster, mpi, start)
        from realflow.runtime.serve import serve

        serve(plan, run_dir, identity, mpi, checkpoint)
    except InputError as error:  # the same on all ranks: one of them says it
        start.stop()
        if mpi.rank == 0:
            print(f"realflow: {error}", file=sys.stderr, flush=True)
        mpi.finalize()
        return 2
    except BaseException:  # noqa: BLE001 - an exception that is not reported here would hang the job
        place = f"rank {identity.rank}" if identity else f"MPI rank {mpi.rank}"
        print(f"realflow: {place}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        mpi.abort()
    mpi.finalize()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(supervised(*(Path(argument) for argument in sys.argv[1:3])))
    except RealFlowError as problem:
        print(f"realflow: {problem}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(problem, InputError) else 1)
