"""Sixteen scenarios on H100 nodes: the planner against its bound, and against other ways of planning.

    python experiments/planner/scenarios.py --list
    python experiments/planner/scenarios.py                          # all that is not recorded yet: hours
    python experiments/planner/scenarios.py --only ppo-7b-7b-128 --task search
    python experiments/planner/scenarios.py --only ppo-7b-7b-128 --task anneal --seeds 3 --seconds 120
    python experiments/planner/scenarios.py --table                  # of what is recorded: results/table.md

Each piece (a scenario, a task, a seed) is a file of its own under `results/`; pieces that are there are left
out unless `--again`. Pieces run one after another, each on one core: several processes may run side by side
(different scenarios or seeds). Annealing is given seconds of a core, not of the clock; of a search both are
recorded, which differ where the cores were shared.
Tasks: `search` (meshes any and powers), `uniform` and `megatron` (rules, without chance: one run stands
for all seeds), `anneal`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The repository before experiments/, which has a folder of the name of the package planner.
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parent)]

from cases import CASES, PER_NODE, Case, cluster, models  # noqa: E402
from record import record  # noqa: E402
from rivals import Annealer, Rival, megatron, uniform  # noqa: E402
from table import write_table  # noqa: E402

from planner.options import Ask, build  # noqa: E402
from planner.search import Problem  # noqa: E402
from planner.searched import search as planned  # noqa: E402
from realflow.api import EFFORTS  # noqa: E402

RESULTS = HERE / "results"
TASKS = ("search", "uniform", "megatron", "anneal")
MESHES = ("any", "powers")


@dataclass(frozen=True)
class Piece:
    """One measurement: it is recorded in a file of its own."""

    case: Case
    task: str
    run: Callable[[], dict[str, Any]]

    @property
    def file(self) -> Path:
        """Where it is recorded."""
        return RESULTS / self.case.name / f"{self.task}.json"


def main() -> None:
    """Run what is asked for, print each result, and write the table."""
    args = _arguments()
    cases = [case for case in CASES if args.only is None or case.name in args.only]
    if args.list:
        for case in cases:
            print(f"{case.name:22} {case.graph:6} {case.devices:5} devices  {dict(case.params)}")
        return
    if not args.table:
        for case in cases:
            for piece in pieces(case, args):
                _run(piece, args.again)
    print(write_table(RESULTS, CASES, args.seconds))


def _arguments() -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, metavar="SCENARIO", help="these scenarios")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS, help="these tasks")
    parser.add_argument("--meshes", nargs="+", choices=MESHES, default=MESHES, help="of searches")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5), help="of annealing (0 to 4)")
    parser.add_argument("--search-seeds", nargs="+", type=int, default=[0], help="of searches (0)")
    parser.add_argument("--seconds", type=float, default=120.0, help="of a core, of annealing (120)")
    parser.add_argument("--effort", choices=EFFORTS, default="normal", help="of searches")
    parser.add_argument("--again", action="store_true", help="also what is recorded")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--list", action="store_true", help="only list the scenarios")
    return parser.parse_args()


def pieces(case: Case, args: argparse.Namespace) -> Iterator[Piece]:
    """What is to be measured of a scenario."""
    if "search" in args.task:
        for meshes in args.meshes:
            for seed in args.search_seeds:
                name = f"search-{meshes}-{seed}" + (f"-{args.effort}" if args.effort != "normal" else "")
                yield Piece(case, name, lambda m=meshes, s=seed: search(case, m, s, args.effort))
    for name, rule in (("uniform", uniform), ("megatron", megatron)):
        if name in args.task:
            yield Piece(case, name, lambda rule=rule: _ruled(case, rule))
    if "anneal" in args.task:
        for seed in args.seeds:
            name = anneal_name(seed, args.seconds)
            yield Piece(case, name, lambda s=seed: anneal(case, s, args.seconds))


def anneal_name(seed: int, seconds: float) -> str:
    """The name of a piece of annealing."""
    return f"anneal-{seed}-{seconds:g}s"


def _run(piece: Piece, again: bool) -> None:
    if piece.file.exists() and not again:
        print(f"{piece.case.name} {piece.task}: recorded already", flush=True)
        return
    found = piece.run()
    record(piece.file, found)
    short = {key: value for key, value in found.items() if key not in ("plan", "tighten")}
    print(f"{piece.case.name} {piece.task}: {json.dumps(short)}", flush=True)


def search(case: Case, meshes: str, seed: int, effort: str) -> dict[str, Any]:
    """What `realflow plan` does, timed from the graph file to the plan."""
    begin, used = time.perf_counter(), time.process_time()
    found = planned(models(case), cluster(case), Ask(meshes=meshes), work=EFFORTS[effort], seed=seed)
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    plan, solution, built = found.plan, found.solution, found.built
    return {
        "meshes": meshes,
        "seed": seed,
        "effort": effort,
        "work": {"solver": EFFORTS[effort].solver, "rounds": EFFORTS[effort].rounds},
        "options": sum(len(call.options) for call in built.problem.calls),
        "considered": solution.considered,
        "costed": built.tried,
        "seconds": seconds,
        "cpu_seconds": used,
        "makespan": solution.makespan,
        "bound": solution.bound,
        "gap": solution.gap,
        "step_seconds": plan.step_seconds,
        "tighten": found.tighten if any(found.tighten) else [],
        "plan": {
            name: f"{how.layout}@{how.ranks[0]}-{how.ranks[-1]}"
            for name, how in plan.calls.items()
            if plan.graph.call(name).model
        },
    }


def anneal(case: Case, seed: int, seconds: float) -> dict[str, Any]:
    """Annealing on the options of the search with meshes of any length."""
    return {"seed": seed, "seconds": seconds, **_told(Annealer(_problem(case.name), seed).run(seconds))}


@lru_cache(maxsize=1)
def _problem(name: str) -> Problem:
    """What the search with meshes of any length solves: seeds share it."""
    case = next(case for case in CASES if case.name == name)
    return build(models(case), cluster(case), Ask(), tighten=tighten(case)).problem


def tighten(case: Case) -> list[int]:
    """Bytes that the search took devices to have less, because a plan did not fit otherwise: rivals plan with
    the same memory. The search must have been recorded."""
    file = RESULTS / case.name / "search-any-0.json"
    if not file.exists():
        raise SystemExit(f"{case.name}: record its search first (--task search --meshes any)")
    found = json.loads(file.read_text(encoding="utf-8"))["results"]["tighten"]
    return [int(size) for size in found]


def _ruled(case: Case, rule: Callable[..., Rival]) -> dict[str, Any]:
    begin = time.perf_counter()
    found = rule(models(case), cluster(case), PER_NODE, tighten(case))
    return {"seconds": time.perf_counter() - begin, **_told(found)}


def _told(rival: Rival) -> dict[str, Any]:
    return {"makespan": rival.makespan, "how": rival.words, "tried": rival.tried}


if __name__ == "__main__":
    main()
