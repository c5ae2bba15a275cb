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
from realflow.realloc import Moved
from realflow.runtime import moves
from realflow.runtime.groups import needed_groups
from realflow.runtime.hosts import Hosts
from realflow.runtime.slices import edge_slices

CPU = torch.device("cpu")
OFFLOADED = {"train": "offload"}


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
    assert (source.residence.where, target.residence.where) == ("away", "away")
    found.add(part)
    for version in (2, 4, 6):
        target.put_away()
        kept, moved, seconds = found.run(part.edge, version)
        assert kept == replace(part, part={}), "the schedule itself is not kept twice"
        assert moved.received_bytes == 2 and seconds >= 0
        assert (source.residence.where, target.residence.where) == ("away", "here"), "the call comes next"
    sample = round(min(1.0, moves.SAMPLE / part.parameters), 3)
    assert part.parameters > moves.SAMPLE
    bound, *rest = noted.log
    assert bound[0] == "bind" and bound[3:] == (None, torch.float32)
    run = ("run", True, False)
    assert rest == [run, ("verify", 1.0, 2), run, ("verify", sample, 4), run, ("verify", sample, 6)]


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_a_follower_is_put_away_again(graph: Graph, monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    """Checksums of what arrives are recorded where the destination is an average."""
    ref = replace(graph.models["ref"], follows=Follow("actor", decay))
    graph = replace(graph, models={**graph.models, "ref": ref})
    plan = place(graph, 2, {"ref": (0,)}, {"train": "p2"}, {"ref": "offload"})
    (edge,) = follow_edges(graph, plan.calls)
    cards = dict.fromkeys(("actor", "ref"), card(ref.path))
    hosts = Hosts(plan, 0, CPU, dict.fromkeys(needed_groups(plan)))  # type: ignore[arg-type]
    noted = Noted()
    monkeypatch.setattr(moves, "Reallocation", noted)
    found = moves.Moves(hosts, CPU)
    found.add(edge_slices(plan, edge, cards)[0])
    assert edge.key in found and "another" not in found
    found.run(edge.key, 2)
    assert noted.log[0][3] == (decay or None)
    assert noted.log[1:] == [("run", True, decay > 0), ("verify", 1.0, 2)]
    assert hosts.part("ref", Holding()).residence.where == "away"
    assert hosts.part("actor", Holding(0, 2, 0, 1)).residence.where == "here"


def test_what_is_here_is_sent_rather_than_what_is_away(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has everything twice: a stage of it, offloaded, for training, and all of it for `greedy`."""
    second = grpo(second=1)
    graph = replace(second, models=graph.models)
    plan = place(graph, 3, {"train": (0, 1), "greedy": (0,), "rollout": (2,)}, {"train": "p2"}, OFFLOADED)
    edge = planned_edges(graph, plan.calls)[-1]
    assert [str(held) for rank, held in edge.sources if rank == 0] == ["whole", "p0/2"]
    part = edge_slices(plan, edge, {"actor": card(graph.models["actor"].path)})[0]
    hosts = Hosts(plan, 0, CPU, dict.fromkeys(needed_groups(plan)))  # type: ignore[arg-type]
    monkeypatch.setattr(moves, "Reallocation", Noted())
    found = moves.Moves(hosts, CPU)
    found.add(part)
    stage = hosts.part("actor", Holding(0, 2, 0, 1))
    assert stage.residence.where == "away", "bound, and put away again"
    restored: list[bool] = []
    monkeypatch.setattr(stage.residence, "restore", lambda: restored.append(True))
    monkeypatch.setattr(moves, "Reallocation", Noted())
    found.run(part.edge, 2)
    assert not restored
