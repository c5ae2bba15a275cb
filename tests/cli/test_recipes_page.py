"""docs/recipes.md: each parameter of its table changes each graph that it names, in what the recipe says, and
nothing where it has the graph's own value; its commands and its data section are right."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from fake_runs import Launcher

import realflow.launch.local
from realflow.cli import build_parser, main
from realflow.data.source import open_source
from realflow.graph import find_graph, load_graph
from realflow.graph.types import Call, Graph

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def table() -> list[tuple[str, list[str], list[str]]]:
    """What each row says: the recipe, its overrides, its graphs."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if line[:2] == "| "
    ]
    return [
        (recipe, shlex.split(given.strip("`")), re.findall(r"`(\w+)`", graphs))
        for recipe, given, graphs in rows[1:]
        if given.startswith("`")
    ]


def rollout(graph: Graph) -> Call:
    return next(call for call in graph.calls if call.op == "generate")


def train(graph: Graph) -> Call:
    return next(call for call in graph.calls if call.op == "train" and call.model == "actor")


def using(graph: Graph, use: str) -> Call:
    return next(call for call in graph.calls if call.decl.name == use)


def stages(graph: Graph) -> object:
    sampling = rollout(graph).sampling
    return sampling and sampling.stages


def rounds(graph: Graph) -> object:
    refill = rollout(graph).refill
    return refill and (refill.call.decl.name, refill.most)


def kl_in_reward(graph: Graph) -> object:
    """Of the call itself, or where a coefficient that adapts starts."""
    found = {
        call.decl.name: call.options["kl_coef"] for call in graph.calls if "kl_coef" in call.decl.options
    }
    return max(value for name, value in found.items() if not name.startswith("losses."))


def importance(graph: Graph) -> object:
    return dict(using(graph, "mismatch.importance").options)


def evaluation(graph: Graph) -> object:
    spec = graph.evaluate
    return spec and (spec.every, spec.graph.samples, spec.keep_best)


WEIGHTS = {"mode": "none", "cap": 2.0, "low": 0.5, "high": 5.0}
ROWS: dict[str, tuple[Callable[[Graph], object], object]] = {
    "stages of a length": (stages, ((20, 16), (None, 32))),
    "replaced while training": (rounds, ("select.mixed", 5)),
    "best of a group": (lambda g: (rollout(g).samples, using(g, "select.best_of").options["keep"]), (16, 1)),
    "minibatches": (lambda graph: train(graph).minibatches, 4),
    "KL in the [loss]": (lambda graph: train(graph).options["kl_coef"], 0.01),
    "KL in the [reward]": (kl_in_reward, 0.01),
    "entropy bonus": (lambda graph: train(graph).options["entropy_coef"], 0.001),
    "every answer counts the same": (lambda graph: train(graph).options["normalise"], "sequence"),
    "weights, [truncated]": (importance, WEIGHTS | {"mode": "truncated", "cap": 3}),
    "weights, masked": (importance, WEIGHTS | {"mode": "masked", "low": 0.2, "high": 2}),
    "noise floor": (lambda g: (using(g, "mismatch.noise_floor").every, g.call("again").every), (5, 5)),
    "evaluations in between": (evaluation, (10, 8, True)),
}
"""A part of a row's recipe -> what of a graph it is, and what that is with the row's parameters."""


@pytest.mark.parametrize("part", ROWS)
def test_a_parameter_sets_its_recipe(part: str) -> None:
    ((_, overrides, graphs),) = [row for row in table() if part in row[0]]
    look, wanted = ROWS[part]
    assert graphs
    for name in graphs:
        plain = load_graph(find_graph(name))
        assert look(load_graph(find_graph(name), overrides)) == wanted != look(plain), name
        same = [f"{key}={json.dumps(plain.params[key])}" for key in (o.partition("=")[0] for o in overrides)]
        same = [text.replace('"', "") for text in same]  # text as it stands
        assert load_graph(find_graph(name), same) == plain, name


def test_no_row_is_left_out() -> None:
    assert (
        len(table()) == len(ROWS) == len(re.findall(r"^\| ", PAGE, re.MULTILINE)) - 2
    )  # the head; all graphs


def test_recipes_is_grpo_with_more_calls() -> None:
    """As it stands: the same model, data, rollout and loss; weights that are all 1."""
    grpo, recipes = (load_graph(find_graph(name)) for name in ("grpo", "recipes"))
    assert (recipes.models, recipes.data, recipes.steps) == (grpo.models, grpo.data, grpo.steps)
    for call in grpo.calls:
        if call.name != "train":
            assert recipes.call(call.name) == call
    more = {"old_logprobs": "prox_logprobs", "weights": "weights"}
    ours, theirs = recipes.call("train"), grpo.call("train")
    assert replace(ours, reads=theirs.reads) == theirs and dict(ours.reads) == {**theirs.reads, **more}
    added = {call.name for call in recipes.calls} - {call.name for call in grpo.calls}
    assert added == {"prox", "weights", "monitor", "again", "noise"}
    assert recipes.call("weights").options["mode"] == "none"


@pytest.mark.parametrize("line", blocks("bash")[0].splitlines())
def test_its_commands(line: str) -> None:
    argv = shlex.split(line)[1:]
    args, rest = build_parser().parse_known_args(argv)
    assert args.what == argv[1] == "recipes" and rest == []
    load_graph(find_graph(argv[1]), argv[2:])


COUNT = 150
"""Questions: of 8 answers that are right with 0.6 all are for about one in sixty."""


def test_prompts_that_are_sometimes_solved(
    model_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's evaluation, judged by a rule, then the page's data section in a graph."""
    monkeypatch.setattr(realflow.launch.local, "supervise", Launcher().supervise)
    models = model_cache / "models"
    (models / "smollm2-135m-instruct" / "config.json").write_bytes(
        (models / "small-llama" / "config.json").read_bytes()
    )
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(COUNT)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (command,) = blocks("bash")[1].splitlines()
    code = main([*shlex.split(command)[1:], "--devices", "1", "--layout", "d1", "--quiet"])
    assert code == 0, capsys.readouterr().err
    lines = Path("evaluations/questions/samples.jsonl").read_text().splitlines()
    given: dict[str, list[float]] = {}
    for row in map(json.loads, lines):
        given.setdefault(row["problem_id"], []).append(row["reward"])
    assert all(len(rewards) == 8 for rewards in given.values()) and len(given) == COUNT
    wanted = {str(i + 1) for i in range(COUNT) if 0.1 < sum(given[f"questions/{i}"]) / 8 < 0.9}
    assert 0 < len(wanted) < COUNT, "every prompt, or none, is kept: the test shows nothing"
    graph = yaml.safe_load(find_graph("generate").read_text()) | yaml.safe_load(blocks("yaml")[0])
    Path("mine.yaml").write_text(yaml.safe_dump(graph))
    source = open_source(load_graph(Path("mine.yaml")).data, seed=0, base=Path())
    found = [source.row(g) for g in range(len(source))]
    assert {row["answer"] for row in found} == wanted and len(found) == len(wanted)
    assert all("What is" in row["prompt"] for row in found)
