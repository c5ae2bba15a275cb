"""`realflow profile`: measure this machine for the planner."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from planner import local_cluster
from realflow.commands.bookkeeping import measure_bookkeeping
from realflow.commands.common import AddCommand, say
from realflow.errors import InputError, Problem, RunError
from realflow.graph import Graph, find_graph, load_graph, shipped_graphs
from realflow.models.fitting import check_fitting
from realflow.models.paths import resolve_model
from realflow.planfile.kinds import runtime_kind
from realflow.profiling.request import ONCE, Request, Subject
from realflow.profiling.store import default_path, document, machine, write

SECONDS = 170.0
"""Of measuring. Starting the ranks and the bookkeeping come on top, about half a minute."""
BUSY = 0.1
"""Noise above which the machine was not quiet."""
YARDSTICK_SECONDS = 3.0
"""Of the fixed pieces of work, before and after everything else."""
START_SECONDS = 300
"""In which ranks have started, even on a busy machine."""
PATIENCE = 8
"""How many times as long as asked for the measurement may take before it is ended: a busy machine."""


def add_commands(add: AddCommand) -> None:
    """Add the command of this module."""
    parser = add(
        "profile",
        run_profile,
        "measure this machine for the planner: layers, decoding, optimizer, messages",
        "realflow profile grpo\n  realflow profile ppo smollm2-135m-instruct --devices 2 -o machine.json",
    )
    parser.add_argument(
        "what",
        metavar="GRAPH|MODEL|key=value",
        nargs="*",
        help="graphs (with their params) whose models are measured, or models: a name, a folder or a hub id "
        "(default: the graph grpo)",
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="ranks that measure (default: its GPUs, or 2 CPU ranks)"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of models given by name (default: bfloat16)")
    parser.add_argument("-o", "--output", metavar="FILE", help="the profile (default: kept for this machine)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help=f"to be measured for (default: {SECONDS:g})",
    )
    parser.set_defaults(overrides=[])


def run_profile(args: argparse.Namespace) -> None:
    """Measure, and write the profile."""
    from realflow.launch.local import stop_signals

    if not 1 <= args.seconds < float("inf"):
        raise InputError(Problem(f"found {args.seconds:g}; expected at least 1", where="seconds"))
    began = time.monotonic()
    overrides = [*args.overrides, *(word for word in args.what if "=" in word)]
    names = [word for word in args.what if "=" not in word] or ["grpo"]
    subjects = find_subjects(names, overrides, args.dtype)
    (node,) = local_cluster(args.devices).nodes
    found = machine(node.kind)
    device = runtime_kind(node.kind)
    request = Request(tuple(subjects), node.devices, found["cores"], device, args.seconds)
    told = ", ".join(one.name for one in subjects)
    say(f"measuring {told} with up to {node.devices} ranks, about {args.seconds + 30:.0f} s")
    with tempfile.TemporaryDirectory(prefix="realflow-profile-") as folder, stop_signals():
        before = measure_yardstick(YARDSTICK_SECONDS)
        rows = measure(request, Path(folder))
        after = measure_yardstick(YARDSTICK_SECONDS)
        beside = {f"yardstick_{name}": (before[name] + after[name]) / 2 for name in before}
        constants = {**measure_bookkeeping(Path(folder)), **beside}
    content = document(found, subjects, rows, constants)
    path = write(content, Path(args.output) if args.output else default_path(found))
    noise = sorted(row["noise"] for row in rows if row["noise"] != ONCE) or [ONCE]
    middle, high = noise[len(noise) // 2], noise[len(noise) * 9 // 10]
    once = sum(row["noise"] == ONCE for row in rows)
    print(
        f"{path}: {len(rows)} points of {told} in {time.monotonic() - began:.0f} s, hash {content['hash']}; "
        f"noise {middle:.1%} in the median, {high:.1%} in the 90th percentile"
        + (f"; there was time for {once} points only once" if once else "")
    )
    if middle > BUSY:
        print("this machine is busy with other work: measure again when it is quiet")


def find_subjects(names: Sequence[str], overrides: Sequence[str], dtype: str) -> list[Subject]:
    """The models of graphs, and models; those of equal shape once."""
    found: dict[str, Subject] = {}
    for name in names:
        for path, kind in _models(name, overrides, dtype):
            folder = resolve_model(path)
            config = _config(folder)
            key = json.dumps([{**config, "_name_or_path": ""}, kind], sort_keys=True)
            label = folder.name if kind == "bfloat16" else f"{folder.name}-{kind}"
            while any(one.name == label for one in found.values()) and key not in found:
                label += "+"
            found.setdefault(key, Subject(label, config, kind))
    return list(found.values())


def _models(name: str, overrides: Sequence[str], dtype: str) -> Iterator[tuple[str, str]]:
    """(path, dtype) of a graph's models, or of a model."""
    if name in shipped_graphs() or name.endswith((".yaml", ".yml")):
        graph: Graph = load_graph(find_graph(name), overrides)
        check_fitting(graph)
        yield from ((spec.path, spec.dtype) for spec in graph.models.values())
    else:
        yield name, dtype


def _config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values


def measure(request: Request, folder: Path) -> list[dict[str, Any]]:
    """The rows that the ranks of a request measure. Raises RunError where they fail."""
    from realflow.launch.local import find_mpirun, mpi_environment

    (folder / "request.json").write_text(request.to_json(), encoding="utf-8")
    command = [find_mpirun(), "-n", str(request.ranks)]
    command += [sys.executable, "-m", "realflow.profiling.worker", str(folder)]
    log = folder / "workers.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            env=mpi_environment(os.environ, request.ranks),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=PATIENCE * request.seconds + START_SECONDS)
        except subprocess.TimeoutExpired:
            raise RunError(
                "the measurement did not end; is this machine busy with other work? Give fewer models, or "
                "more --seconds"
            ) from None
        finally:
            _end(process)
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunError("the measurement failed: " + "\n".join(lines[-15:]))
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return rows


def measure_yardstick(seconds: float) -> dict[str, float]:
    """How long the fixed pieces of work (`realflow.profiling.yardstick`) take now, on all cores of this
    machine, in a process of their own. Raises RunError where it fails."""
    command = [sys.executable, "-m", "realflow.profiling.yardstick", f"{seconds:g}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError("the yardstick failed: " + done.stderr.strip()[-2000:])
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave none of its processes behind."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
