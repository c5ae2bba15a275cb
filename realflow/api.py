"""RealFlow from Python: load a graph, plan it, run it.

from realflow import Graph, plan, run

graph = Graph.load("grpo", ["steps=2", "prompts=4"])
result = run(plan(graph, devices=2), name="first")
print(result.run_dir, result.metrics[-1]["critic/rewards/mean"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from planner import EVERY, local_cluster, make_plan, read_cluster
from realflow.errors import InputError, Problem, RunError
from realflow.graph import Graph, find_graph
from realflow.graph import load_graph as _load
from realflow.models.card import Card, card
from realflow.models.fitting import check_fitting
from realflow.models.paths import resolve_model
from realflow.planfile import Cluster, Plan, check_plan, read_plan

if TYPE_CHECKING:
    from realflow.launch.local import RunResult

__all__ = ["Graph", "InputError", "Plan", "RunError", "RunResult", "load_graph", "plan", "read_plan", "run"]


def __getattr__(name: str) -> object:
    if name == "RunResult":
        from realflow.launch.local import RunResult

        return RunResult
    raise AttributeError(f"module 'realflow.api' has no attribute {name!r}")


def load_graph(graph: str | Path, overrides: Sequence[str] = ()) -> Graph:
    """A checked graph, by its name or path, with `key=value` overrides of its params.

    Raises InputError with everything that is wrong.
    """
    return _load(find_graph(str(graph)), overrides)


def plan(
    graph: Graph | str | Path,
    *,
    devices: int | None = None,
    cluster: Cluster | str | Path | None = None,
    layouts: Mapping[str, str] | str | None = None,
    overrides: Sequence[str] = (),
    micro_batch_tokens: int = 4096,
    slots: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """Plan a graph on this machine (`devices` of it) or on a cluster.

    `layouts` is one layout for all calls (`"d2"`) or one for each (`{"rollout": "d2t2@0-3", "train":
    "p2:zero_bubble,offload"}`, `"*"` for the others), as `--layout` of `realflow plan` takes them; without
    it each call runs data-parallel on all devices. `overrides` go with a graph's name. `say` is told what
    takes long.
    Raises InputError for what is wrong or cannot run yet, RunError where a card cannot be made.
    """
    if devices is not None and cluster is not None:
        raise InputError(Problem("give either the number of devices or a cluster, not both", where="devices"))
    graph = _graph(graph, overrides)
    if cluster is None:
        cluster = local_cluster(devices)
    elif not isinstance(cluster, Cluster):
        cluster = read_cluster(cluster)
    if isinstance(layouts, str):
        layouts = {EVERY: layouts}
    return make_plan(
        graph,
        cluster,
        layouts or {},
        _cards(graph, say),
        micro_batch_tokens=micro_batch_tokens,
        slots=slots,
    )


def run(
    what: Plan | Graph | str | Path,
    *,
    name: str | None = None,
    run_dir: str | Path | None = None,
    devices: int | None = None,
    layouts: Mapping[str, str] | str | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> RunResult:
    """Run a plan, or plan a graph and run it; returns when it is done.

    The run's directory is `run_dir`, or `runs/<name>`, or a new one in `runs/` named after the
    graph. `devices`, `layouts` and `overrides` are for a graph. Raises InputError for wrong input,
    RunError where the run fails.
    """
    if isinstance(what, Plan):
        if devices is not None or layouts is not None or overrides:
            raise InputError("a plan is resolved already: devices, layouts and overrides belong to a graph")
        check_plan(what)
        chosen = what
    else:
        chosen = plan(what, devices=devices, layouts=layouts, overrides=overrides)
    folder = new_run_dir(chosen.graph.name, name=name, run_dir=run_dir)
    from realflow.launch.local import supervise

    return supervise(chosen, folder, quiet=quiet)


def new_run_dir(graph: str, *, name: str | None = None, run_dir: str | Path | None = None) -> Path:
    """The folder of a new run; it must not exist, or be empty. Nothing is created.

    Without a name it is `runs/<graph>`, with `-2`, `-3`, ... where that is taken.
    """
    if name is not None and run_dir is not None:
        raise InputError(Problem("give either a name or a run's directory, not both", where="name"))
    if name is not None and (not name or Path(name).name != name or name.startswith(".")):
        raise InputError(Problem(f"{name!r} is no name for a folder in runs/", where="name"))
    if run_dir is None and name is None:
        taken = Path("runs") / graph
        number = 1
        while taken.exists():
            number += 1
            taken = Path("runs") / f"{graph}-{number}"
        return taken
    folder = Path(run_dir) if run_dir is not None else Path("runs") / str(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            Problem(f"{folder} exists already; choose another, or remove it", where="run directory")
        )
    return folder


def _graph(graph: Graph | str | Path, overrides: Sequence[str]) -> Graph:
    if not isinstance(graph, Graph):
        return load_graph(graph, overrides)
    if overrides:
        raise InputError("a loaded graph is resolved already: give overrides when it is loaded")
    return graph


def _cards(graph: Graph, say: Callable[[str], None] | None) -> dict[str, Card]:
    """Every model's card; the problems of all models are told together."""
    cards: dict[str, Card] = {}
    problems: list[Problem] = []
    for name, model in graph.models.items():
        try:
            cards[name] = card(resolve_model(model.path), say)
        except InputError as error:
            problems += _at(error.problems, f"models.{name}.path")
    if problems:
        raise InputError(problems)
    check_fitting(graph)  # after the cards: models are on this machine now
    return cards


def _at(problems: Iterable[Problem], where: str) -> list[Problem]:
    return [Problem(problem.message, where, problem.file, problem.line) for problem in problems]
