"""The PPO graph planned: as docs/ppo.md shows it, and with layouts that cannot be."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from ppo_tiny import ppo_graph

from realflow.api import plan, read_plan
from realflow.errors import InputError
from realflow.graph import find_graph, load_graph
from realflow.models.paths import resolve_model
from realflow.planfile import write_plan

DOCS = Path(__file__).resolve().parents[2] / "docs" / "ppo.md"


def documented() -> dict[str, str]:
    """The layouts of the command in docs/ppo.md."""
    command = re.search(r"realflow plan ppo[^`]*", DOCS.read_text("utf-8"))
    assert command is not None
    words = shlex.split(command.group(0).replace("\\\n", " "))
    return dict(word.split("=", 1) for last, word in pairwise(words) if last == "--layout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ppo-plan")


def test_the_plan_of_the_docs(folder: Path) -> None:
    """Six calls, six layouts, some on disjoint ranks; actor and critic are reallocated, each by itself."""
    layouts = documented()
    made = plan(ppo_graph(folder), devices=4, layouts=layouts)
    assert len({str(made.calls[name].layout) for name in layouts}) == len(layouts) == 6
    assert not set(made.calls["reward"].ranks) & set(made.calls["ref"].ranks)
    assert {(edge.model, edge.source, edge.destination) for edge in made.reallocs} == {
        ("actor", "train", "rollout"),
        ("critic", "train_critic", "values"),
    }
    write_plan(made, folder / "plan.yaml")
    assert read_plan(folder / "plan.yaml").calls == made.calls


def test_a_missing_reward_model_is_told_with_how_to_get_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REALFLOW_CACHE", str(folder / "empty"))
    name = load_graph(find_graph("ppo")).models["reward"].path
    with pytest.raises(InputError, match=rf"{name} is not in the cache.*experiments/ppo/reward_model\.py"):
        resolve_model(name)
    script = DOCS.parents[1] / "experiments" / "ppo" / "reward_model.py"
    assert f'NAME = "{name}"' in script.read_text("utf-8")


def test_a_layout_that_the_model_cannot_be_cut_for_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="critic") as caught:
        plan(ppo_graph(folder), devices=4, layouts={"*": "d1@0", "values": "p4@0-3"})
    assert "values=p4@0-3" in str(caught.value)
