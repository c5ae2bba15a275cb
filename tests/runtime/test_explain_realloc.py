"""`realflow explain plan.yaml --realloc`: the numbers of each edge, for people."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from runs import write_graph

from realflow.api import plan
from realflow.cli import main
from realflow.commands.reallocs import render_reallocs
from realflow.graph import load_graph
from realflow.models.card import card
from realflow.planfile import Cluster, Node, Plan, parse_plan, plan_to_yaml, write_plan
from realflow.planfile.holdings import planned_edges
from realflow.realloc.edges import edge_schedule, topology
from realflow.realloc.topology import loads

LAYOUTS = {"rollout": "t2@2-3", "train": "p2@0-1", "ref": "d2@0-1", "reward": "d2@2-3", "credit": "d1@0"}


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(tmp_path_factory.mktemp("explain"), follows="{model: actor, decay: 0.9}")


def shown(made: Plan) -> str:
    out = io.StringIO()
    render_reallocs(made, Console(file=out, width=120, highlight=False))
    return out.getvalue()


def test_bytes_bounds_loads_and_floor(graph_file: Path) -> None:
    nodes = tuple(Node(f"node{index}", 2, "cuda", 80 << 30, inside=300e9) for index in range(2))
    made = plan(load_graph(graph_file), cluster=Cluster(nodes), layouts=LAYOUTS)
    assert parse_plan(plan_to_yaml(made)) == made
    text = shown(made)
    (edge,) = planned_edges(made.graph, made.calls)
    found = card(made.graph.models["actor"].path)
    known = topology(made.cluster)
    numbers = loads(edge_schedule(made, edge, {"actor": found}), known)
    assert numbers.bytes == numbers.lower_bound_bytes == made.reallocs[0].bytes
    move, follow, _ = re.split(r"\n(?=ref follows|Seconds)", text)
    assert move.startswith("actor for rollout: p0/2 on 0, p1/2 on 1 -> t0/2 on 2, t1/2 on 3")
    for value in (
        numbers.bytes,
        numbers.between_nodes_bytes,
        numbers.busiest_bound_bytes,
        *(link.bytes for link in numbers.links[:4]),
    ):
        assert f"{value:,}" in move, value
    assert numbers.floor_seconds
    assert re.search(r"floor +[\d.e-]+ ms", move)
    assert "rank 0 sends to other nodes" in move
    assert follow.startswith("ref follows actor (average): p0/2 on 0, p1/2 on 1 -> whole on 0-1")
    told = " ".join(text.split())
    assert "taken as 300 GB/s for a rank inside its node and 50 GB/s to other nodes" in told


def test_a_plan_whose_calls_have_their_weights(tmp_path: Path) -> None:
    made = plan(load_graph(write_graph(tmp_path)), devices=2, layouts="d2")
    assert shown(made) == "Reallocation: none, every call has its weights.\n"


def test_the_command(graph_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(load_graph(graph_file), devices=2, layouts={"train": "p2", "rollout": "t2"})
    path = write_plan(made, tmp_path / "plan.yaml")
    assert main(["explain", str(path), "--realloc"]) == 0
    told = capsys.readouterr().out
    assert "actor for rollout: p0/2 on 0, p1/2 on 1 -> t0/2 on 0, t1/2 on 1" in told
    assert "lower bound" in told and "optimal: no choice has less" in told
    assert "copied on its rank" in told and "shared memory" not in told
    digits = {len(number) for number in re.findall(r"\.(\d+) ms", told)}
    assert len(digits) == 1, "one number of digits in a column"


def test_shared_memory_is_told_apart_from_copies(graph_file: Path) -> None:
    """Rank 0 trains and samples with the whole model: nothing is copied there, only rank 1 receives."""
    made = plan(load_graph(graph_file), devices=2, layouts={"*": "d1@0", "rollout": "d2"})
    text = shown(made).partition("ref follows")[0]
    size = made.reallocs[0].bytes
    assert re.search(rf"shared memory +{size:,} +used by both calls: neither moved nor copied", text)
    assert re.search(r"copied on its rank +0 ", text)


def test_nodes_with_links_of_their_own_are_told_apart(graph_file: Path) -> None:
    nodes = (Node("a", 2, "cuda", inside=300e9), Node("b", 2, "cpu"), Node("c", 1, "cpu"))
    told = " ".join(shown(plan(load_graph(graph_file), cluster=Cluster(nodes), layouts=LAYOUTS)).split())
    assert "300 GB/s for a rank inside its node and 50 GB/s to other nodes (a); 2.4 GB/s" in told
    assert "1.25 GB/s to other nodes (b, c)" in told


def test_when_weights_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An average, and how often, is said in the plan's table and above its details."""
    for follows, words in (
        ("{model: actor, decay: 0.9, every: 5 steps}", "(average, every 5 steps)"),
        ("{model: actor, decay: 0.5}", "(average)"),
    ):
        graph = load_graph(write_graph(tmp_path, follows=follows))
        path = write_plan(plan(graph, devices=2, layouts={"ref": "d1@1"}), tmp_path / "when.yaml")
        assert main(["explain", str(path)]) == 0
        assert f"train -> ref {words}" in " ".join(capsys.readouterr().out.split())
        assert main(["explain", str(path), "--realloc"]) == 0
        assert f"ref follows actor {words}: " in " ".join(capsys.readouterr().out.split())
