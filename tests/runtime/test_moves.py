"""What a worker does around a reallocation: bind once, restore, compare checksums, put away."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from scenes import grpo, place
from tiny import tiny_model

from realflow.graph.types import Follow, Graph
from realflow.models.card import card
from realflow.planfile.holdings import Holding, follow_edges, planned_edges
from realflow.realloc.execute import Moved
from realflow.runtime import moves
from realflow.runtime.groups import needed_groups
from realflow.runtime.hosts import Hosts
from realflow.runtime.slices import edge_slices

CPU = torch.device("cpu")


@dataclass
class Noted:
    """Stands for `Reallocation`, which needs several processes; notes how it is used."""

    log: list[Any] = field(default_factory=list)

    def __call__(
        self, part: Any, rank: int, group: None, read: Any, write: Any, *_: Any, **more: Any
    ) -> Noted:
        self.log.append(("bind", sorted(read)[:1], len(write), more["decay"], more["wire"]))
        self.bound = [*read.values(), *write.values()]
        return self

    def run(self, record: bool = False) -> Moved:
        there = all(s.tensor.untyped_storage().nbytes() > 0 for storages in self.bound for s in storages)
        self.log.append(("run", there, record))
        return Moved(1, 2, 3, 0.5)

    def verify(self, share: float, seed: int) -> int:
        self.log.append(("verify", round(share, 3), seed))
        return 1


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    path = str(tiny_model(tmp_path_factory.mktemp("moves") / "model", dtype="float32"))
    found = grpo()
    models = {name: replace(spec, path=path, dtype="float32") for name, spec in found.models.items()}
    return replace(found, models=models)


def test_checksums_of_everything_first_and_of_a_sample_later(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = {"rollout": "free", "train": "offload"}
    plan = place(graph, 2, {}, {"rollout": "t2", "train": "p2"}, after)
    (edge,) = planned_edges(graph, plan.calls)
    part = edge_slices(plan, edge, {"actor": card(graph.models["actor"].path)})[0]
    hosts = Hosts(plan, 0, CPU, dict.fromkeys(needed_groups(plan)))  # type: ignore[arg-type]
    noted = Noted()
    monkeypatch.setattr(moves, "Reallocation", noted)
    found = moves.Moves(hosts, CPU)
    source, target = hosts.part("actor", Holding(0, 2, 0, 1)), hosts.part("actor", Holding(0, 1, 0, 2))
    assert (source.residence.where, target.residence.where) == ("away", "here")
    for version in (2, 4, 6):
        target.put_away()
        moved, seconds = found.run(part, version)
        assert moved.received_bytes == 2 and seconds >= 0
        assert (source.residence.where, target.residence.where) == ("away", "here"), "the call comes next"
    sample = round(min(1.0, moves.SAMPLE / part.parameters), 3)
    assert part.parameters > moves.SAMPLE
    bound, *rest = noted.log
    assert bound[0] == "bind" and bound[3:] == (None, torch.float32)
    run = ("run", True, False)
    assert rest == [run, ("verify", 1.0, 2), run, ("verify", sample, 4), run, ("verify", sample, 6)]


def test_an_average_is_recorded_and_put_away_again(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = replace(graph.models["ref"], follows=Follow("actor", 0.9))
    graph = replace(graph, models={**graph.models, "ref": ref})
    plan = place(graph, 2, {"ref": (0,)}, {"train": "p2"}, {"ref": "offload"})
    (edge,) = follow_edges(graph, plan.calls)
    cards = dict.fromkeys(("actor", "ref"), card(ref.path))
    hosts = Hosts(plan, 0, CPU, dict.fromkeys(needed_groups(plan)))  # type: ignore[arg-type]
    noted = Noted()
    monkeypatch.setattr(moves, "Reallocation", noted)
    moves.Moves(hosts, CPU).run(edge_slices(plan, edge, cards)[0], 2)
    assert noted.log[0][3] == 0.9
    assert noted.log[1:] == [("run", True, True), ("verify", 1.0, 2)]
    assert hosts.part("ref", Holding()).residence.where == "away"
    assert hosts.part("actor", Holding(0, 2, 0, 1)).residence.where == "here"
