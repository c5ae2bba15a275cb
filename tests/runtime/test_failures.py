"""Whatever dies or misbehaves: one clear error, every process gone, nothing half-written."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from runs import ending, execute, write_graph

from realflow.api import plan
from realflow.errors import InputError, RunError
from realflow.graph import load_graph
from realflow.launch.local import supervise
from realflow.planfile import write_plan

SECONDS = 10.0
SAMPLE = r"sample \d+: "
SAMPLES = r"samples? \d+(, \d+)*(, \.\.\.)?: "
"""The samples that a function was given as whole columns; the step's samples come in pieces."""


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan on two ranks that need each other in every model call, whose rewards take half a second
    each, so that there is time to strike."""
    folder = tmp_path_factory.mktemp("failures")
    graph = load_graph(write_graph(folder, reward="my_rewards:slow"), ["steps=50"])
    layouts = {"rollout": "t2", "train": "p2"}
    write_plan(plan(graph, devices=2, layouts=layouts), folder / "plan.yaml")
    return folder / "plan.yaml"


def processes(run_dir: Path, module: str) -> list[psutil.Process]:
    """The run's processes that execute a module."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if module in line and str(run_dir) in line:
            found.append(process)
    return found


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> object:
    """Poll until `what` is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to that in time")


MODULES = {"worker": "realflow.runtime.worker", "master": "realflow.launch.master"}


def start(plan_file: Path, run_dir: Path) -> subprocess.Popen[str]:
    """`realflow run` as a user starts it."""
    command = [sys.executable, "-m", "realflow", "run", str(plan_file), "--run-dir", str(run_dir), "--quiet"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def at_start(run_dir: Path) -> bool:
    return len(processes(run_dir, "realflow.runtime.worker")) >= 2


def at_step(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


@pytest.mark.parametrize("victim", ["worker", "master"])
@pytest.mark.parametrize("moment", [at_start, at_step])
def test_kill(plan_file: Path, tmp_path: Path, victim: str, moment: Callable[[Path], bool]) -> None:
    run_dir = tmp_path / "run"
    with ending(start(plan_file, run_dir)) as supervisor:
        wait_for(lambda: moment(run_dir))
        module = MODULES[victim]
        everyone = psutil.Process(supervisor.pid).children(recursive=True)
        target = [p for p in processes(run_dir, module) if p.name() != "mpirun" and "-n" not in p.cmdline()][
            -1
        ]
        os.kill(target.pid, signal.SIGKILL)
        started = time.monotonic()
        _, told = supervisor.communicate(timeout=60)
        assert time.monotonic() - started < SECONDS
    assert supervisor.returncode == 1, told
    _, alive = psutil.wait_procs(everyone, timeout=max(0.1, SECONDS - (time.monotonic() - started)))
    assert not alive
    assert "Traceback" not in told
    if victim == "master":
        assert "the master was killed by signal 9" in told
        assert "during" in told
    else:
        assert "rank 1" in told or "rank 0" in told
        assert "start-up" in told if moment is at_start else "@" in told
    check_whole(run_dir)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_supervisor_leaves_nothing_behind(
    plan_file: Path, tmp_path: Path, sign: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "realflow", "run", str(plan_file), "--run-dir", str(run_dir), "--quiet"]
    with ending(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)) as supervisor:
        wait_for(lambda: at_step(run_dir))
        everyone = psutil.Process(supervisor.pid).children(recursive=True)
        assert len(everyone) >= 4
        if sign == signal.SIGTERM:
            second = subprocess.run(
                [*command[:4], "--resume", str(run_dir)], capture_output=True, text=True, timeout=60
            )
            assert second.returncode == 2 and "another realflow run is at work" in second.stderr
        supervisor.send_signal(sign)
        _, told = supervisor.communicate(timeout=30)
    _, alive = psutil.wait_procs(everyone, timeout=SECONDS)
    assert not alive
    assert "Traceback" not in told
    if sign != signal.SIGKILL:
        assert supervisor.returncode == 1
        assert "goes on from" in told or "nothing to go on from" in told
        assert (run_dir / "error.txt").read_text().startswith("interrupted during")
        check_whole(run_dir)


def test_what_a_users_module_prints_is_no_event(tmp_path: Path) -> None:
    graph = write_graph(tmp_path)
    module = tmp_path / "my_rewards.py"
    module.write_text("print('hello from the rewards')\n" + module.read_text())
    result = execute(graph, tmp_path / "run", 1, ("steps=1",))
    assert len(result.metrics) == 1
    assert "hello from the rewards" in (result.run_dir / "workers.log").read_text()


def test_input_that_only_the_master_finds_wrong(tmp_path: Path) -> None:
    graph = write_graph(tmp_path)
    made = plan(load_graph(graph), devices=1, layouts="d1")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InputError, match="model"):
        supervise(made, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def check_whole(run_dir: Path) -> None:
    """Every file of a run is complete: JSON lines parse, no partial file or folder is left."""
    assert not list(run_dir.rglob("*partial*"))
    assert not (run_dir / ".rendezvous").exists()
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = run_dir / name
        if path.exists():
            text = path.read_text()
            assert not text or text.endswith("\n")
            for line in text.splitlines():
                json.loads(line)
    if (run_dir / "trace.json").exists():
        json.loads((run_dir / "trace.json").read_text())


@pytest.mark.parametrize(
    ("reward", "timeout", "told"),
    [
        ("my_rewards:raises", 60, [SAMPLES, "KeyError", "no such column", "my_rewards.py"]),
        ("my_rewards:hangs", 2, [SAMPLE, "ran longer than its 2 s"]),
        ("my_rewards:hangs_on_columns", 2, [SAMPLES, "ran longer than its 2 s"]),
        ("my_rewards:not_a_number", 60, [SAMPLE, "nan"]),
        ("my_rewards:too_few", 60, [SAMPLES, "returned 1 values for rewards; expected"]),
    ],
)
def test_bad_reward_functions(tmp_path: Path, reward: str, timeout: float, told: list[str]) -> None:
    graph = write_graph(tmp_path, reward=reward, timeout=timeout)
    with pytest.raises(RunError) as caught:
        execute(graph, tmp_path / "run", 1)
    text = str(caught.value)
    first, *rest = told
    assert re.search(rf"reward@0\.\d+ failed on rank 0: call 'reward': {reward}: {first}", text), text
    for part in rest:
        assert part in text
    assert (tmp_path / "run" / "error.txt").read_text().strip() in text
    check_whole(tmp_path / "run")


def test_a_reward_that_never_lets_go_of_the_interpreter(tmp_path: Path) -> None:
    """A backtracking regex: no other thread of the worker runs, not even its watchdog."""
    graph = write_graph(tmp_path, reward="my_rewards:spins", timeout=1)
    started = time.monotonic()
    with pytest.raises(RunError) as caught:
        execute(graph, tmp_path / "run", 1)
    text = str(caught.value)
    assert re.search(r"rank 0 has died .* during .*reward@0\.\d+ \(my_rewards:spins on samples \d+", text), (
        text
    )
    assert "in spins" in (tmp_path / "run" / "workers.log").read_text(), "the log shows where it stood"
    assert time.monotonic() - started < 60
    check_whole(tmp_path / "run")


def test_a_rank_lost_in_a_pipeline(tmp_path: Path) -> None:
    """The last stage dies in its loss; the first one waits for gradients from it."""
    graph = write_graph(tmp_path, loss="my_rewards:deadly_loss")
    with pytest.raises(RunError, match=r"rank 1 has died .* during train@0") as caught:
        execute(graph, tmp_path / "run", 2, train="p2")
    assert "rank 0: train@0" in str(caught.value)
    check_whole(tmp_path / "run")


def test_a_rank_lost_in_a_reallocation(tmp_path: Path) -> None:
    """Rank 2 is stopped while rank 0 trains, and killed when the others wait for it in the realloc."""
    graph = load_graph(write_graph(tmp_path, loss="my_rewards:slow_loss"), ["minibatches=1"])
    layouts = {"train": "d1@0", "rollout": "t2@1-2", "ref": "d1@0", "reward": "d1@0", "credit": "d1@0"}
    write_plan(plan(graph, devices=3, layouts=layouts), tmp_path / "plan.yaml")
    run_dir = tmp_path / "run"
    with ending(start(tmp_path / "plan.yaml", run_dir)) as supervisor:
        wait_for(lambda: (tmp_path / "training.txt").exists(), seconds=180)
        workers = [p for p in processes(run_dir, MODULES["worker"]) if "-n" not in p.cmdline()]
        (victim,) = [p for p in workers if p.environ()["OMPI_COMM_WORLD_RANK"] == "2"]
        victim.suspend()
        wait_for(lambda: at_step(run_dir))
        time.sleep(2.0)  # the next rollout's move has begun
        everyone = psutil.Process(supervisor.pid).children(recursive=True)
        victim.kill()
        started = time.monotonic()
        _, told = supervisor.communicate(timeout=60)
        _, alive = psutil.wait_procs(everyone, timeout=max(0.1, SECONDS - (time.monotonic() - started)))
        assert not alive
        assert time.monotonic() - started < SECONDS
    assert supervisor.returncode == 1
    assert "rank 2 has died (its process is gone) during realloc:actor:rollout@v1" in told, told
    assert "rank 0: realloc:actor:rollout@v1" in told
    assert "Traceback" not in told
    check_whole(run_dir)


@pytest.mark.full
@pytest.mark.parametrize("victim", ["worker", "master"])
@pytest.mark.parametrize("number", range(6))
def test_kill_at_any_moment(tmp_path: Path, victim: str, number: int) -> None:
    """Kills at random moments of a run that saves after every second step and moves weights in each."""
    graph = load_graph(write_graph(tmp_path), ["steps=2000"])
    layouts = {"rollout": "t2@0-1", "train": "p2@0-1", "ref": "d1@1"}
    write_plan(plan(graph, devices=2, layouts=layouts), tmp_path / "plan.yaml")
    run_dir = tmp_path / "run"
    module = MODULES[victim]
    with ending(start(tmp_path / "plan.yaml", run_dir)) as supervisor:
        wait_for(lambda: processes(run_dir, module))
        time.sleep(random.Random(f"{victim} {number}").uniform(0.0, 25.0))
        everyone = psutil.Process(supervisor.pid).children(recursive=True)
        target = [p for p in processes(run_dir, module) if "-n" not in p.cmdline()][-1]
        os.kill(target.pid, signal.SIGKILL)
        started = time.monotonic()
        _, told = supervisor.communicate(timeout=60)
        _, alive = psutil.wait_procs(everyone, timeout=max(0.1, SECONDS - (time.monotonic() - started)))
    assert not alive
    assert time.monotonic() - started < SECONDS
    assert supervisor.returncode == 1
    assert "Traceback" not in told
    assert "rank" in told or victim == "master"
    assert "start-up" in told or "@" in told or "waiting for work" in told, told
    check_whole(run_dir)
