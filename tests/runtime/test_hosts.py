"""Parts of models on a worker: what calls share, and what is put away between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scenes import grpo, place
from tiny import tiny_model

from realflow.algorithms.losses import sft
from realflow.data.batch import Batch, pack
from realflow.graph.types import Graph
from realflow.planfile import Plan
from realflow.planfile.holdings import Holding
from realflow.runtime.groups import needed_groups
from realflow.runtime.hosts import Hosts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    path = str(tiny_model(tmp_path_factory.mktemp("hosts") / "model", dtype="float32"))
    found = grpo(second=1)
    models = {name: replace(spec, path=path, dtype="bfloat16") for name, spec in found.models.items()}
    return replace(found, models=models)


def hosts(plan: Plan, rank: int = 0) -> Hosts:
    """The hosts of a rank, whose groups cannot be used: nothing is computed over several ranks here."""
    groups = dict.fromkeys(needed_groups(plan))
    return Hosts(plan, rank, CPU, groups)  # type: ignore[arg-type]


def held(found: Hosts, plan: Plan, call: str) -> torch.Tensor:
    with found.using(plan.graph.call(call)) as model:
        return model.flat.storage


def test_equal_holdings_share_storage_and_others_do_not(graph: Graph) -> None:
    layouts = {"rollout": "t2", "train": "t2", "greedy": "p2", "ref": "t2"}
    ranks = {"rollout": (0, 1), "train": (0, 2), "greedy": (0, 1), "ref": (0, 1)}
    plan = place(graph, 3, ranks, layouts)
    found = hosts(plan)
    rollout, train, greedy, ref = (held(found, plan, call) for call in ("rollout", "train", "greedy", "ref"))
    assert rollout.data_ptr() == train.data_ptr(), "first half of two, whoever has the other one"
    assert len({storage.data_ptr() for storage in (rollout, greedy, ref)}) == 3
    with found.using(graph.call("rollout")) as model:
        assert model.place.tp.ranks == model.region.axis.ranks == (0, 1)
    with found.using(graph.call("train")) as other:
        assert other.place.tp.ranks == other.region.axis.ranks == (0, 2), "its own tensor group"
    assert model.module is other.module
    assert found.part("actor", Holding(0, 2, 0, 1)).model.stage.stop == 1


def test_flags_of_a_call_are_those_of_its_model_alone(graph: Graph) -> None:
    plan = place(graph, 2, {}, {"train": "t2", "rollout": "t2", "greedy": "t2"})
    train = replace(plan.calls["train"], sequence_parallel=True, recompute=True)
    found = hosts(replace(plan, calls={**plan.calls, "train": train}))
    for call, expected in (("train", True), ("rollout", False)):
        with found.using(graph.call(call)) as model:
            assert (model.sequence_parallel, model.recompute) == (expected, expected)


def batches() -> list[Batch]:
    tokens = [torch.tensor([5, 9, 11, 7, 8]), torch.tensor([6, 20, 21])]
    masks = [torch.arange(len(sample)) > 1 for sample in tokens]
    fields = {"tokens": tokens, "loss_mask": masks}
    extents, dtypes = dict.fromkeys(fields, "token"), {"tokens": "int", "loss_mask": "bool"}
    return [pack([0, 1], [5, 3], fields, extents, dtypes)]  # type: ignore[arg-type]


def states(found: Hosts, plan: Plan, call: str) -> torch.Tensor:
    batch = batches()[0]
    with found.using(plan.graph.call(call)) as model, torch.no_grad():
        return model.run(model.prepare(batch.fields["tokens"], batch.positions, batch.cu_seqlens))


def test_offloading_lets_go_of_memory_and_changes_no_answer(graph: Graph) -> None:
    after = dict.fromkeys(("ref", "train", "rollout", "greedy"), "offload")
    kept, offloaded = (place(graph, 1, {}, after=a) for a in ({}, after))
    found = {"kept": hosts(kept), "offloaded": hosts(offloaded)}
    parts = {name: [here.part(m, Holding()) for m in ("actor", "ref")] for name, here in found.items()}

    def there(name: str) -> list[bool]:
        return [part.model.flat.storage.untyped_storage().nbytes() > 0 for part in parts[name]]

    assert (there("kept"), there("offloaded")) == ([True, True], [False, False])
    for step in range(3):
        for call in ("ref", "rollout"):
            one, other = (states(found[n], p, call) for n, p in (("kept", kept), ("offloaded", offloaded)))
            assert torch.equal(one, other), (call, step)
            assert there("offloaded") == [False, False]
        results = []
        for name, plan in (("kept", kept), ("offloaded", offloaded)):
            with found[name].using(plan.graph.call("train")):
                trainer = found[name].trainer("actor")
                results.append(trainer.step(batches(), sft, reads={}))
        assert results[0] == results[1]
        assert there("offloaded") == [False, False]
    start = hosts(kept).part("actor", Holding()).model.flat.storage
    trained = [found[name].part("actor", Holding()) for name in ("kept", "offloaded")]
    trained[1].residence.restore()
    assert torch.equal(trained[0].model.flat.storage, trained[1].model.flat.storage)
    assert not torch.equal(trained[0].model.flat.storage, start), "it was trained"


def test_a_generator_is_kept_only_where_its_call_says_so(graph: Graph) -> None:
    plan = place(graph, 1, {}, after={"greedy": "offload"})
    found = hosts(plan)
    for name, kept in (("rollout", True), ("greedy", False)):
        call, made = graph.call(name), []
        for _ in range(2):
            with found.using(call):
                made.append(found.generator(call))
        assert (made[0] is made[1]) == kept, "its KV cache is let go of with it"


def test_what_one_user_keeps_is_kept(graph: Graph) -> None:
    plan = place(graph, 1, {}, after={"rollout": "offload", "ref": "offload"})
    found = hosts(plan)
    assert held(found, plan, "rollout").untyped_storage().nbytes() > 0, "train and greedy keep it"
    assert held(found, plan, "ref").untyped_storage().nbytes() == 0


def test_freed_weights_are_there_for_the_first_use_alone(graph: Graph) -> None:
    plan = place(
        graph, 2, {}, {"rollout": "t2", "greedy": "t2", "train": "d2"}, {"rollout": "free", "greedy": "free"}
    )
    found = hosts(plan)
    part = found.part("actor", Holding(0, 1, 0, 2))
    assert part.residence.where == "away", "loaded, and in host memory until then"
    assert part.model.flat.storage.untyped_storage().nbytes() == 0
    with found.using(graph.call("rollout")):
        assert part.model.flat.storage.any(), "nothing has moved yet"
    assert part.residence.where == "freed"
    assert part.model.flat.storage.untyped_storage().nbytes() == 0


def test_a_host_loads_from_the_checkpoint_what_changes(graph: Graph, tmp_path: Path) -> None:
    plan = place(graph, 1, {})
    with pytest.raises(Exception, match="step-000002/actor"):
        Hosts(plan, 0, CPU, {}, tmp_path / "step-000002")
