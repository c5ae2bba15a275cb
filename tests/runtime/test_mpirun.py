"""`mpirun -n 2 realflow run plan.yaml`, without the supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import ending, write_graph
from test_failures import at_step, check_whole, processes, wait_for

from realflow.api import plan
from realflow.graph import load_graph
from realflow.launch.local import find_mpirun, mpi_environment
from realflow.observe.metrics import read_metrics
from realflow.planfile import write_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plans on two ranks: of a few steps, and of many with slow rewards."""
    folder = tmp_path_factory.mktemp("bare")
    quick = load_graph(write_graph(folder), ["steps=2"])
    write_plan(plan(quick, devices=2, layouts="d2"), folder / "plan.yaml")
    slow = load_graph(write_graph(folder, reward="my_rewards:slow"), ["steps=50"])
    write_plan(plan(slow, devices=2, layouts="d2"), folder / "slow.yaml")
    return folder


def mpirun(ranks: int, plan_file: Path, run_dir: Path) -> subprocess.Popen[str]:
    command = [find_mpirun(), "-n", str(ranks), sys.executable, "-m", "realflow", "run", str(plan_file)]
    return subprocess.Popen(
        [*command, "--run-dir", str(run_dir)],
        env=mpi_environment(os.environ, ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_run(folder: Path, tmp_path: Path) -> None:
    with ending(mpirun(2, folder / "plan.yaml", tmp_path / "run")) as job:
        told, _ = job.communicate(timeout=120)
    assert job.returncode == 0, told
    assert len(read_metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "actor" / "config.json").exists()
    with ending(mpirun(2, folder / "plan.yaml", tmp_path / "run")) as again:
        told, _ = again.communicate(timeout=60)
    assert again.returncode == 2
    assert told.count("exists and is not empty") == 1


def test_another_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    with ending(mpirun(3, folder / "plan.yaml", tmp_path / "run")) as job:
        told, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert told.count("the plan is for 2 devices, but mpirun started 3 ranks") == 1
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_a_killed_worker(folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with ending(mpirun(2, folder / "slow.yaml", run_dir)) as job:
        wait_for(lambda: at_step(run_dir))
        everyone = [
            *psutil.Process(job.pid).children(recursive=True),
            *processes(run_dir, "realflow.launch.master"),
        ]
        workers = [
            p
            for p in everyone
            if "realflow" in p.cmdline() and "run" in p.cmdline() and "-n" not in p.cmdline()
        ]
        assert len(workers) == 2
        os.kill(workers[1].pid, signal.SIGKILL)
        started = time.monotonic()
        job.communicate(timeout=30)
        _, alive = psutil.wait_procs(everyone, timeout=max(0.1, 10 - (time.monotonic() - started)))
    assert not alive
    assert job.returncode != 0
    error = (run_dir / "error.txt").read_text()
    assert "has died" in error and "rank 1" in error and "@" in error
    check_whole(run_dir)
