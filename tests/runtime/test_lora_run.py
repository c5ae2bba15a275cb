"""Real runs that train adapters: whatever the layouts, the same answer, and files that peft loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from runs import close, execute, samples, write_graph
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from realflow.api import plan
from realflow.graph import load_graph
from realflow.launch.local import supervise
from realflow.models.lora import PREFIX, WEIGHTS, initial

OPTIMIZER = '    optimizer: {name: adamw, lr: "${lr}"}\n'
LORA = "    lora: {rank: 4, targets: [q_proj, v_proj, o_proj, up_proj, down_proj], save: SAVE}\n"
SEED = 1
MERGED = ["actor", "adapters"]


def lora_graph(folder: Path) -> dict[str, Path]:
    """The graph of `runs` with adapters, once for each thing that they can be saved as."""
    text = write_graph(folder).read_text()
    assert OPTIMIZER in text
    found = {}
    for save in ("adapters", "merged"):
        found[save] = folder / f"{save}.yaml"
        found[save].write_text(text.replace(OPTIMIZER, OPTIMIZER + LORA.replace("SAVE", save)))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    """The graphs, and a run on one rank, where nothing moves: rollouts are made with the adapters active."""
    folder = tmp_path_factory.mktemp("lora-runs")
    graphs = lora_graph(folder)
    execute(graphs["adapters"], folder / "one", 1)
    return graphs, folder / "one"


def adapters(run_dir: Path, *below: str, step: int = 3) -> dict[str, torch.Tensor]:
    return load_file(run_dir.joinpath("checkpoints", f"step-{step:06d}", *below, WEIGHTS))


def first(of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What training started from."""
    return {name: initial(name.removeprefix(PREFIX), tuple(t.shape), SEED) for name, t in of.items()}


def completions(run_dir: Path) -> dict[int, str]:
    return {key: row["completion"] for key, row in samples(run_dir).items()}


def test_merged_on_the_way_the_answer_is_the_same(
    alone: tuple[dict[str, Path], Path], tmp_path: Path
) -> None:
    """Trained in stages and generated from in tensor shards, with the adapters merged as weights move."""
    graphs, one = alone
    result = execute(graphs["merged"], tmp_path / "run", 2, rollout="t2", train="p2", ref="d2")
    theirs = adapters(one, "actor")
    assert close(adapters(tmp_path / "run", *MERGED), theirs, first(theirs)) > 1e-3
    assert completions(tmp_path / "run") == completions(one)
    assert result.metrics[-1]["realloc/actor/bytes"] > 0
    # peft's adapters on the model are the merged model, which loads by itself
    base = AutoModelForCausalLM.from_pretrained(one.parent / "model", dtype=torch.float64)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    expected = PeftModel.from_pretrained(
        base, one / "checkpoints" / "step-000003" / "actor"
    ).merge_and_unload()
    saved = tmp_path / "run" / "checkpoints" / "step-000003" / "actor"
    found = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64).state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)
    changed = {name for name, value in found.items() if (value - start[name]).abs().max() > 1e-4}
    assert changed == {name for name in start if any(f"{key}_proj.weight" in name for key in TARGETS)}


TARGETS = ("q", "v", "o", "up", "down")


@pytest.mark.full
def test_control_answers_tell_of_adapters(alone: tuple[dict[str, Path], Path], tmp_path: Path) -> None:
    """A rollout that has the base's weights gives other answers from the second step on."""
    graphs, one = alone
    execute(graphs["adapters"], tmp_path / "run", 1, ("lr=0",))
    found, theirs = completions(tmp_path / "run"), completions(one)
    each = 6 * 4  # samples of a step
    assert all(found[i] == theirs[i] for i in range(each))
    assert sum(found[i] != theirs[i] for i in range(each, 3 * each)) > each


@pytest.mark.full
@pytest.mark.parametrize("save", ["adapters", "merged"])
def test_a_run_goes_on_under_another_plan(
    alone: tuple[dict[str, Path], Path], tmp_path: Path, save: str
) -> None:
    """What tensor shards have saved, stages go on with, and both kinds of holdings have it at once."""
    graphs, one = alone
    run_dir, steps = tmp_path / "run", ["steps=2"]
    supervise(
        plan(
            load_graph(graphs[save], steps),
            devices=2,
            layouts={"train": "t2", "rollout": "d2", "ref": "d1@0"},
        ),
        run_dir,
        quiet=True,
    )
    layouts = {"train": "p2:offload", "rollout": "t2", "ref": "d2"}
    supervise(plan(load_graph(graphs[save]), devices=2, layouts=layouts), run_dir, quiet=True, resume=True)
    theirs = adapters(one, "actor")
    assert (
        close(adapters(run_dir, *(["actor"] if save == "adapters" else MERGED)), theirs, first(theirs)) > 1e-3
    )
    assert completions(run_dir) == completions(one)


@pytest.mark.full
@pytest.mark.parametrize(
    ("devices", "layouts"),
    [
        (4, {"rollout": "d4", "train": "d2t2:sequence_parallel,recompute", "ref": "t4:offload"}),
        (4, {"rollout": "p2@0-1:free", "train": "t2p2:zero_bubble", "ref": "d1@3"}),
        (3, {"rollout": "t2@0,1", "train": "t2@0,2", "ref": "t3"}),
    ],
    ids=["replicas", "bubble", "a replica of both kinds"],
)
def test_every_layout_gives_the_same_answer(
    alone: tuple[dict[str, Path], Path], tmp_path: Path, devices: int, layouts: dict[str, str]
) -> None:
    """Also where one rank of a replica generates with adapters active and another with merged weights."""
    graphs, one = alone
    execute(graphs["adapters"], tmp_path / "run", devices, **layouts)
    theirs = adapters(one, "actor")
    assert close(adapters(tmp_path / "run", "actor"), theirs, first(theirs)) > 1e-3
    assert completions(tmp_path / "run") == completions(one)
