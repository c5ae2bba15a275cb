"""A follower that computes in bfloat16 follows: its average is kept, saved and restored in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scenes import grpo, place
from tiny import tiny_model

from realflow.engines.state import save_shards
from realflow.errors import InputError
from realflow.graph.types import Follow, Graph
from realflow.models.card import card
from realflow.models.save import save_model
from realflow.planfile import Plan
from realflow.planfile.holdings import Holding, follow_edges
from realflow.realloc.edges import edge_schedule, wire_dtype
from realflow.runtime.groups import needed_groups
from realflow.runtime.hosts import Hosts
from realflow.runtime.moves import Moves
from realflow.runtime.slices import edge_slices

CPU = torch.device("cpu")
DECAY = 0.99
STEPS = 60
WHOLE = Holding()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("averages") / "model", dtype="float32", seed=5)


def scene(model: Path, dtype: str = "bfloat16", decay: float = DECAY) -> Graph:
    graph = grpo()
    specs = {name: replace(spec, path=str(model), dtype=dtype) for name, spec in graph.models.items()}
    specs["ref"] = replace(specs["ref"], follows=Follow("actor", decay))
    return replace(graph, models=specs)


def hosts_of(plan: Plan, rank: int, checkpoint: Path | None = None) -> Hosts:
    return Hosts(plan, rank, CPU, dict.fromkeys(needed_groups(plan)), checkpoint)  # type: ignore[arg-type]


def test_a_bfloat16_follower_follows_small_steps(model: Path) -> None:
    """The actor's weights grow by one part in 3,000 a step; of that, an average takes a hundredth."""
    graph = scene(model)
    plan = place(graph, 1, {}, {}, {"ref": "offload"})
    (edge,) = follow_edges(graph, plan.calls)
    hosts = hosts_of(plan, 0)
    actor, ref = hosts.part("actor", WHOLE), hosts.part("ref", WHOLE)
    assert ref.residence.where == "away" == ref.average.residence.where  # type: ignore[union-attr]
    found = Moves(hosts, CPU)
    found.add(edge_slices(plan, edge, dict.fromkeys(graph.models, card(model)))[0])
    files = load_file(model / "model.safetensors")
    expected = {name: value.double() for name, value in files.items()}
    coarse = {name: value.bfloat16() for name, value in files.items()}
    exact = {name: actor.model.flat.view(name).double() for name in files}
    for step in range(STEPS):
        for name in files:
            exact[name] *= 1 + 1 / 3000
            actor.model.flat.view(name).copy_(exact[name])
            now = actor.model.flat.view(name)
            expected[name] = DECAY * expected[name] + (1 - DECAY) * now.double()
            coarse[name] = (DECAY * coarse[name].float() + (1 - DECAY) * now.float()).bfloat16()
        found.run(edge.key, step)
        assert ref.residence.where == "away" == ref.average.residence.where  # type: ignore[union-attr]
    ref.restore()
    for name in files:
        average, weights = ref.flat.view(name), ref.model.flat.view(name)
        assert average.dtype == torch.float32 and weights.dtype == torch.bfloat16
        assert torch.equal(weights, average.bfloat16())
        went = torch.linalg.norm(expected[name] - files[name].double())
        assert torch.linalg.norm(average.double() - expected[name]) < 1e-3 * went, name
        if files[name].dim() > 1 and "lm_head" not in name:  # the control: bfloat16 alone stands still
            assert torch.equal(coarse[name], files[name].bfloat16()), name
            assert not torch.equal(weights, coarse[name]), name


@pytest.mark.parametrize(
    ("dtype", "decay", "own"),
    [("bfloat16", DECAY, True), ("bfloat16", 0.0, False), ("float32", DECAY, False)],
)
def test_an_average_of_its_own_only_where_it_is_needed(
    model: Path, dtype: str, decay: float, own: bool
) -> None:
    graph = scene(model, dtype, decay)
    plan = place(graph, 1, {})
    assert (hosts_of(plan, 0).part("ref", WHOLE).average is not None) == own


def test_weights_travel_to_an_average_as_they_are(model: Path) -> None:
    """An average in float32 costs no more bytes on the way than its bfloat16 source."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        graph = scene(model, dtype)
        plan = place(graph, 2, {"train": (0,), "ref": (1,)})
        (edge,) = follow_edges(graph, plan.calls)
        assert wire_dtype(graph, edge) == dtype
        found[dtype] = edge_schedule(plan, edge, dict.fromkeys(graph.models, card(model))).bytes
    assert found["float32"] == 2 * found["bfloat16"]


def test_averages_survive_a_checkpoint_under_another_layout(model: Path, tmp_path: Path) -> None:
    graph, folder = scene(model), tmp_path / "state" / "ref"
    first = place(graph, 4, {}, {"ref": "d1t2p2"})
    generator = torch.Generator().manual_seed(1)
    whole = {
        n: torch.randn(v.shape, generator=generator)
        for n, v in load_file(model / "model.safetensors").items()
    }
    for rank in range(4):
        hosts = hosts_of(first, rank)
        host = hosts.part("ref", Holding(rank // 2, 2, rank % 2, 2))
        for name, box in host.model.boxes().items():
            host.flat.view(name).copy_(whole[name][tuple(slice(*span) for span in box)])
        average = hosts.average(graph.call("ref"))
        assert average is host.average is not None
        save_shards(host.model, average.shards(host.model.place), 3, folder)
    stored: dict[str, int] = {}
    for path in folder.iterdir():
        for key, tensor in load_file(path).items():
            name = key.split("|")[1]
            stored[name] = stored.get(name, 0) + tensor.numel()
    assert stored == {name: value.numel() for name, value in whole.items()}, "each element once"
    alone = hosts_of(place(graph, 1, {}), 0)
    for name in ("actor", "ref"):
        save_model(alone.part(name, WHOLE).model, alone.tokenizer(name), tmp_path / name)
    second = place(graph, 3, {"train": (2,), "ref": (0, 1)}, {"ref": "t2"})
    for rank in range(2):
        host = hosts_of(second, rank, tmp_path).part("ref", Holding(0, 1, rank, 2))
        for name, box in host.model.boxes().items():
            assert torch.equal(host.flat.view(name), whole[name][tuple(slice(*span) for span in box)]), name
    (folder / "shard-00000-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match="is in none of the files"):
        hosts_of(second, 0, tmp_path)
