"""docs/losses.md: its table is what is declared, its graphs load, its loss is one, its commands are right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from realflow.cli import build_parser
from realflow.engines.functions import load_callable
from realflow.graph import find_graph, load_graph
from realflow.graph.builtins import BUILTINS

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_its_table_has_every_loss_as_it_is_declared() -> None:
    seen = {}
    for row in re.findall(r"^\| `losses.*$", PAGE, re.MULTILINE):
        uses, *_, reads, weighed = [cell.strip() for cell in row.strip("|").split("|")]
        for use in re.findall(r"`(losses\.\w+)`", uses):
            decl = BUILTINS[use]
            assert decl.normalise == weighed, use
            seen[use] = reads
            fields = {read.field for read in decl.reads if not read.optional} - {"logprobs"}
            if reads != "the same":
                assert fields <= set(re.findall(r"`(\w+)`", reads)), use
    assert seen.keys() == {name for name, decl in BUILTINS.items() if decl.kind == "loss"}


def test_the_mask_of_m2po_wires() -> None:
    calls = yaml.safe_load(next(block for block in blocks("yaml") if "masks.m2po" in block))
    assert load_graph(graph_with(calls)).call("train").reads["loss_mask"] == "m2po_mask"


def graph_with(calls: dict[str, Any]) -> dict[str, Any]:
    """GRPO's calls, and others in place of those of their names."""
    rollout = {"model": "actor", "op": "generate", "batch": "4 prompts", "samples": 2, "max_new_tokens": 8}
    before = {
        "rollout": rollout,
        "reward": {"op": "function", "use": "rewards.last_number"},
        "credit": {"op": "function", "use": "advantages.grpo"},
    }
    return {
        "name": "page",
        "models": {"actor": {"path": "m", "optimizer": {"lr": 1e-5}}},
        "data": {"source": "rows:sums", "fields": {"prompt": "question", "answer": "answer"}},
        "calls": {**before, **calls},
        "steps": 1,
    }


def test_its_pairs_are_pairs(tmp_path: Path) -> None:
    data = yaml.safe_load(next(block for block in blocks("yaml") if "preferences" in block))["data"]
    assert load_graph({**dpo(), "data": data}).data.pairs


def dpo() -> dict[str, Any]:
    ref = {"model": "ref", "op": "infer", "use": "logprobs", "writes": {"logprobs": "ref_logprobs"}}
    train = {"model": "actor", "op": "train", "use": "losses.dpo"}
    models = {"actor": {"path": "m", "optimizer": {"lr": 1e-5}}, "ref": {"path": "m"}}
    return {"name": "page", "models": models, "calls": {"ref": ref, "train": train}, "steps": 1}


def test_its_commands() -> None:
    (block,) = blocks("bash")
    lines = block.splitlines()
    assert len(lines) == 3
    for line in lines:
        argv = shlex.split(line)[1:]
        args, rest = build_parser().parse_known_args(argv)
        assert args.what == argv[1] and rest == [], line
        load_graph(find_graph(argv[1]), argv[2:])


def test_its_loss_is_one(tmp_path: Path) -> None:
    """Beside a graph, without touching the package."""
    (tmp_path / "my_losses.py").write_text(blocks("python")[0])
    text = yaml.safe_dump(graph_with({"train": {"model": "actor", "op": "train", "use": "my_losses:plain"}}))
    (tmp_path / "mine.yaml").write_text(text)
    train = load_graph(tmp_path / "mine.yaml").call("train")
    assert train.options == {"floor": -5.0, "normalise": "token"}
    loss = load_callable("my_losses:plain", tmp_path)
    logprobs = torch.tensor([-1.0, -9.0, -2.0], requires_grad=True)
    terms = loss(logprobs, torch.tensor([2.0, 1.0, 1.0]), torch.tensor([True, True, False]))
    assert terms.per_token.tolist() == [2.0, 0.0, 0.0] and terms.metrics["kept"].tolist() == [1, 0, 0]


@pytest.mark.full
@pytest.mark.parametrize("line", blocks("bash")[0].splitlines() if blocks("bash") else [])
def test_its_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the small real model, whose loss is finite, in a folder of their own."""
    from realflow.api import run

    monkeypatch.chdir(tmp_path)
    _, _, name, *overrides = shlex.split(line)
    result = run(name, overrides=overrides, devices=1, name="page", quiet=True)
    assert len(result.metrics) == 2
    assert all(
        0 < value < 100 for row in result.metrics for key, value in row.items() if key.endswith("/loss")
    )
