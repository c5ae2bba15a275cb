"""`realflow run` and `report`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from planner import parse_layouts
from realflow import api
from realflow.commands.common import AddCommand, layout_arguments, say
from realflow.errors import InputError, Problem
from realflow.graph.yamlfile import load_yaml
from realflow.planfile import Plan, check_runnable, read_plan, run_problems
from realflow.planfile.types import TRACK_MEMORY

_MPI_RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK")


def add_commands(add: AddCommand) -> None:
    """Add the commands of this module."""
    run = add(
        "run",
        run_run,
        "run a plan, or plan a graph and run it",
        "realflow run plan.yaml --name first\n  realflow run grpo steps=2 --devices 2\n"
        "  realflow run --resume runs/first steps=100\n  mpirun -n 2 realflow run plan.yaml",
    )
    run.add_argument(
        "what", metavar="PLAN|GRAPH", nargs="?", help="path of a plan file, or a graph as in realflow plan"
    )
    run.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="set a param of the graph")
    layout_arguments(run)
    run.add_argument("--name", help="the run's name: its directory is runs/NAME (default: the graph's name)")
    run.add_argument("--run-dir", metavar="DIR", help="the run's directory, in place of --name")
    run.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run in DIR from its newest checkpoint, under its own plan or the PLAN given",
    )
    run.add_argument(
        "--restarts",
        metavar="N",
        type=int,
        default=0,
        help="resume by itself up to N times when the run fails",
    )
    run.add_argument(
        "--track-memory",
        action="store_true",
        help="record the peak of the memory that tensors take in each call, on each rank (slower on CPUs)",
    )
    run.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    report = add("report", run_report, "write a run's report.html", "realflow report runs/first")
    report.add_argument("run_dir", metavar="RUN_DIR", help="a run's directory")


def run_run(args: argparse.Namespace) -> None:
    """Run a plan or a graph, as the supervisor or as one rank of somebody's mpirun."""
    if args.restarts < 0:
        raise InputError(Problem(f"expected 0 or more, not {args.restarts}", where="--restarts"))
    if args.resume is not None:
        _resume(args)
        return
    if args.what is None:
        raise InputError("give a plan or a graph to run, or --resume DIR; realflow graphs lists the graphs")
    is_plan = looks_like_plan(args.what)
    if any(name in os.environ for name in _MPI_RANK):
        _run_rank(args, is_plan)
        return
    plan = _watched(_plan(args, is_plan), args.track_memory)
    folder = api.new_run_dir(plan.graph.name, name=args.name, run_dir=args.run_dir)
    from realflow.launch.local import supervise

    result = supervise(plan, folder, quiet=args.quiet, restarts=args.restarts)
    _tell(result, args.quiet)


def _resume(args: argparse.Namespace) -> None:
    """Go on with a run."""
    folder = Path(args.resume)
    if args.name is not None or args.run_dir is not None:
        raise InputError(
            Problem("the run keeps its directory; leave out --name and --run-dir", where="--resume")
        )
    if not (folder / "plan.yaml").is_file():
        raise InputError(Problem("expected a run's directory with a plan.yaml", file=str(folder)))
    if args.what is None or "=" in args.what:
        settings = [*([args.what] if args.what else []), *args.overrides]
        plan = _with_steps(read_plan(folder / "plan.yaml"), settings)
    else:
        plan = _plan(args, looks_like_plan(args.what))
    plan = _watched(plan, args.track_memory)
    from realflow.launch.local import supervise

    result = supervise(plan, folder, quiet=args.quiet, resume=True, restarts=args.restarts)
    _tell(result, args.quiet)


def _tell(result: api.RunResult, quiet: bool) -> None:
    """How the run compares with its plan, and where it is."""
    from realflow.observe.predicted import lines

    if not quiet:
        for line in lines(result.metrics):
            print(line)
    print(f"done: {result.run_dir}")


def _watched(plan: Plan, track_memory: bool) -> Plan:
    """A plan that says whether its run records the peaks of memory."""
    return replace(plan, extra={**plan.extra, TRACK_MEMORY: True}) if track_memory else plan


def _with_steps(plan: Plan, settings: list[str]) -> Plan:
    """A run's own plan, with another number of steps if one is given (nothing else can change)."""
    for setting in settings:
        name, _, value = setting.partition("=")
        if name != "steps" or not value.isdigit() or int(value) < 1:
            raise InputError(
                Problem(
                    f"{setting}: only steps=N can be set here; for anything else give a plan",
                    where="--resume",
                )
            )
        plan = replace(plan, graph=replace(plan.graph, steps=int(value)))
    return plan


def looks_like_plan(what: str) -> bool:
    """Whether an argument is the path of a plan file, and not a graph."""
    path = Path(what)
    if not path.is_file():
        return False
    value = load_yaml(path, []).value
    return isinstance(value, dict) and ("format" in value or "cluster" in value)


def _plan(args: argparse.Namespace, is_plan: bool) -> Plan:
    if not is_plan:
        return check_runnable(
            api.plan(
                args.what,
                devices=args.devices,
                cluster=args.cluster,
                layouts=parse_layouts(args.layout),
                overrides=args.overrides,
                say=say,
            )
        )
    _refuse_options(args)
    from realflow.models.layouts import plan_problems

    return read_plan(args.what, run_problems, partial(plan_problems, say=say))


def _refuse_options(args: argparse.Namespace) -> None:
    given = [*args.overrides, *(["--devices"] if args.devices is not None else [])]
    given += [option for option in ("--cluster", "--layout") if getattr(args, option[2:])]
    if given:
        raise InputError(
            Problem(
                f"{args.what} is a plan, which is resolved already; give {', '.join(given)} to realflow plan"
            )
        )


def _run_rank(args: argparse.Namespace, is_plan: bool) -> None:
    """Be one rank of a bare mpirun."""
    if not is_plan:
        raise InputError(
            Problem(
                f"{args.what} is no plan file; under mpirun all ranks need the same plan: make it first with "
                "realflow plan GRAPH -o plan.yaml"
            )
        )
    _refuse_options(args)
    if args.track_memory:
        raise InputError(
            Problem(
                f"under mpirun, write {TRACK_MEMORY}: true under extra in the plan", where="--track-memory"
            )
        )
    folder = Path(args.run_dir or Path("runs") / (args.name or _shared_name(args.what, os.environ)))
    from realflow.runtime import worker

    code = worker.main(Path(args.what), folder)
    if code != 0:
        raise SystemExit(code)


def _shared_name(plan: str, environ: Mapping[str, str]) -> str:
    """A name for the run on which all ranks of one MPI job agree without talking, and no other job."""
    job = environ.get("PMIX_NAMESPACE") or environ.get("SLURM_JOB_ID")
    if job is None:
        raise InputError(
            Problem("this MPI tells no name of its job: give --name or --run-dir", where="--name")
        )
    return f"{Path(plan).stem}-{re.sub(r'[^A-Za-z0-9]+', '-', job).strip('-')}"


def run_report(args: argparse.Namespace) -> None:
    """Write a run's report and say where it is."""
    folder = Path(args.run_dir)
    if not folder.is_dir():
        raise InputError(Problem("there is no such folder; expected a run's directory", file=str(folder)))
    from realflow.observe.report import write_report

    print(write_report(folder))
