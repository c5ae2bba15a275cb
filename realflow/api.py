"""RealFlow from Python: load a graph, plan it, run it.

from realflow import Graph, plan, run

graph = Graph.load("grpo", ["steps=2", "prompts=4"])
result = run(plan(graph, devices=2), name="first")
print(result.run_dir, result.metrics[-1]["critic/rewards/mean"])
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from planner import EVERY, local_cluster, make_plan, read_cluster
from planner.decoder import Decoder, read_decoder
from planner.estimate import estimate, with_estimate
from planner.options import Ask, Models, Wishes
from planner.options.pins import parse_pins
from planner.profile import Profile, read_profile
from planner.rates import is_of
from planner.search import Work
from planner.searched import search_plan
from realflow.errors import InputError, Problem, RunError
from realflow.graph import Graph, find_graph
from realflow.graph import load_graph as _load
from realflow.graph.types import Head
from realflow.models.card import Card, cached, card, config_hash
from realflow.models.fitting import check_fitting
from realflow.models.paths import find_model, resolve_model
from realflow.planfile import Cluster, Plan, check_plan, check_runnable, read_plan

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


EFFORTS: Mapping[str, Work] = {
    "low": Work(solver=2.0, rounds=2_000),
    "normal": Work(),
    "high": Work(solver=120.0, rounds=100_000),
}
"""How much a search may do. It ends earlier where nothing can be better."""


def plan(
    graph: Graph | str | Path,
    *,
    devices: int | None = None,
    cluster: Cluster | str | Path | None = None,
    layouts: Mapping[str, str] | str | None = None,
    overrides: Sequence[str] = (),
    micro_batch_tokens: int | None = None,
    slots: int | None = None,
    fixed: Mapping[str, str] | None = None,
    meshes: str = "any",
    effort: str = "normal",
    seed: int = 0,
    profile: Profile | str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """Plan a graph on this machine (`devices` of it) or on a cluster.

    Where and how calls run is searched for; `fixed` says it of some of them (`{"rollout": "d4t2@0-7"}`, with
    or without ranks and flags), `meshes` whether runs of nodes may have `any` length or only `powers` of two,
    `effort` (low, normal, high) how long to search; the same seed gives the same plan. `profile` is what
    `realflow profile` measured; of this machine the stored one is taken.

    With `layouts` nothing is searched: they are one layout for all calls (`"d2"`) or one for each
    (`{"rollout": "d2t2@0-3", "train": "p2:zero_bubble,offload"}`, `"*"` for the others), as `--layout` of
    `realflow plan` takes them. `overrides` go with a graph's name. `say` is told what takes long.
    Raises InputError for what is wrong or cannot run yet, RunError where a card cannot be made.
    """
    if devices is not None and cluster is not None:
        raise InputError(Problem("give either the number of devices or a cluster, not both", where="devices"))
    graph = _graph(graph, overrides)
    local = cluster is None
    where = _cluster(devices, cluster)
    if isinstance(layouts, str):
        layouts = {EVERY: layouts}
    if layouts:
        if fixed:
            raise InputError(Problem("fixed calls are for the search: give layouts or fixed", where="fixed"))
        given = make_plan(
            graph,
            where,
            layouts,
            _cards(graph, say),
            micro_batch_tokens=4096 if micro_batch_tokens is None else micro_batch_tokens,
            slots=slots,
        )
        measured = profile_of(profile, where, local=local)
        return with_estimate(given, estimate(given, known_decoders(graph), profile=measured))
    for name, value, known in (("effort", effort, EFFORTS), ("meshes", meshes, ("any", "powers"))):
        if value not in known:
            raise InputError(Problem(f"found {value!r}; expected {' or '.join(known)}", where=name))
    ask = Ask(
        meshes=meshes,
        pins=parse_pins(fixed or {}, len(where.devices)),
        wishes=Wishes(micro_batch_tokens, slots),
        profile=profile_of(profile, where, local=local),
    )
    return search_plan(known_models(graph, say), where, ask, work=EFFORTS[effort], seed=seed)


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
    check_runnable(chosen)
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


def _cluster(devices: int | None, cluster: Cluster | str | Path | None) -> Cluster:
    if cluster is None:
        return local_cluster(devices)
    return cluster if isinstance(cluster, Cluster) else read_cluster(cluster)


def profile_of(given: Profile | str | Path | None, cluster: Cluster, *, local: bool) -> Profile | None:
    """The profile that is given, or that of this machine where it is planned for. Raises InputError where it
    is of no device of the cluster."""
    if given is None:
        from realflow.profiling.store import stored

        path = stored(cluster.nodes[0].kind) if local else None
        return None if path is None else read_profile(path)
    found = given if isinstance(given, Profile) else read_profile(given)
    if not any(is_of(found, node) for node in cluster.nodes):
        kinds = " and ".join(sorted({node.kind for node in cluster.nodes}))
        message = f"it was measured on {found.machine.get('kind')}, but the cluster has {kinds}"
        raise InputError(Problem(f"{message}: measure there (realflow profile)", where="profile"))
    return found


def known_models(graph: Graph, say: Callable[[str], None] | None = None) -> Models:
    """What is known of a graph's models: their configs, and the cards of those that can be built here.

    A folder with no more than a config.json will do, and torch need not be there: sizes are then counted from
    the config. Raises InputError with the problems of all models.
    """
    decoders: dict[str, Decoder] = {}
    cards: dict[str, Card] = {}
    bare: list[str] = []
    problems: list[Problem] = []
    for name, model in graph.models.items():
        try:
            folder = resolve_model(model.path)
            decoders[name] = config_decoder(folder, model.head)
            found = cached(config_hash(folder))
            if found is None and can_build(folder):
                found = card(folder, say)
        except InputError as error:
            problems += _at(error.problems, f"models.{name}.path")
            continue
        if found is None:
            bare.append(name)
        else:
            cards[name] = found
    if problems:
        raise InputError(problems)
    check_fitting(graph)  # after the cards: models are on this machine now
    known = f"Model: of {' and '.join(bare)} the config alone is known; sizes are counted from it."
    notes = [known] if bare else []
    return Models(graph, decoders, cards, tuple(notes))


def known_decoders(graph: Graph) -> dict[str, Decoder]:
    """The decoders of a graph's models whose configs are on this machine. Raises InputError where one cannot
    be read."""
    folders = {name: find_model(spec.path) for name, spec in graph.models.items()}
    return {
        name: config_decoder(folder, graph.models[name].head)
        for name, folder in folders.items()
        if folder is not None
    }


def config_decoder(folder: Path, head: Head = "lm") -> Decoder:
    """The decoder that a model folder's config describes. Raises InputError where it cannot be read."""
    file = folder / "config.json"
    config_hash(folder)  # says what is wrong with the file as such
    return read_decoder(json.loads(file.read_text(encoding="utf-8")), head, str(file))


def can_build(folder: Path) -> bool:
    """Whether a model's modules can be built here: its weights are there, and so is torch."""
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return weights and importlib.util.find_spec("torch") is not None


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
