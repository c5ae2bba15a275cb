"""Commands and files of docs/evaluation.md: all run, with a launcher that answers by a rule."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from fake_runs import Launcher

import realflow.launch.local
from realflow.cli import main
from realflow.evaluation.formats import ROLES
from realflow.evaluation.samples import from_line
from realflow.graph import find_graph, load_graph

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text("utf-8")
FILES = {
    "aime.jsonl": [{"id": 60 + i, "problem": f"Add 1 to {i}.", "answer": str(i + 1)} for i in range(5)],
    "HumanEval.jsonl": [
        {"task_id": str(i), "prompt": "def f():\n", "test": "", "entry_point": "f"} for i in range(3)
    ],
    "quiz.jsonl": [{"text": f"What is {i}?", "gold": i} for i in range(4)],
}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def launcher(model_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """The files, the model and the run that the page names, and no processes."""
    stands_in = Launcher()
    monkeypatch.setattr(realflow.launch.local, "supervise", stands_in.supervise)
    models = model_cache / "models"
    shutil.copy(models / "small-llama" / "config.json", models / "smollm2-135m-instruct")
    shutil.copytree(models / "small-llama", "runs/grpo/checkpoints/step-000045/actor")
    for name, rows in FILES.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (judge,), (graph,) = blocks("python"), blocks("yaml")
    Path("judge.py").write_text(judge)
    Path("quiz.yaml").write_text(graph)
    return stands_in


def test_its_commands(capsys: pytest.CaptureFixture[str], launcher: Launcher) -> None:
    commands = "".join(blocks("bash")).splitlines()
    for command in commands:
        code = main([*shlex.split(command)[1:], "--devices", "1", "--layout", "d1", "--quiet"])
        out, err = capsys.readouterr()
        assert code == 0, (command, err)
        assert "results: evaluations/" in out, command
    assert len(commands) == 7 and "Higher than evaluations/smollm2-135m-instruct by" in out
    uses = {plan.graph.calls[-1].decl.name for plan in launcher.plans}
    given = {f"rewards.{name}" for name in ("math", "humaneval", "gym", "last_number")}
    assert uses == {"judge:exact", *given}
    model = "smollm2-135m-instruct"
    assert {path.name for path in Path("evaluations").iterdir()} == {
        *("aime", "quiz", "after", model, f"{model}-HumanEval", f"{model}-quiz"),
        f"{model}-chain_sum-word_sorting",
    }
    heads = "| source | problems | pass@1 | pass@8 | greedy | missing | cut off | tokens |"
    assert heads in PAGE and heads in Path("evaluations/smollm2-135m-instruct/results.md").read_text()


def test_its_line_is_a_sample() -> None:
    (line,) = blocks("json")
    assert from_line(json.loads(line)).problem_id == "aime/60"


def test_the_protocol_is_that_of_the_shipped_graph() -> None:
    call = load_graph(find_graph("evaluate")).call("rollout")
    assert call.sampling is not None
    told = (call.samples, call.sampling.temperature, call.sampling.top_p)
    assert told == (32, 0.6, 0.95) and "32 answers" in PAGE
    assert "at temperature 0.6 and top_p 0.95" in PAGE
    for role in ("problem", "answer"):
        assert sum(f"`{name}`" in PAGE for name in ROLES[role]) >= 2
