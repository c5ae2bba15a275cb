"""Models that read the same tokens must have the same vocabulary; refused before anything starts."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from realflow.api import plan
from realflow.cli import main
from realflow.errors import InputError
from realflow.graph import graph_to_mapping, load_graph
from realflow.graph.find import find_graph
from realflow.models.fitting import HEAD
from realflow.models.vocabularies import vocabulary_problems
from realflow.planfile import write_plan


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that agree, and others that differ in one token, in size, or have no tokenizer."""
    root = tmp_path_factory.mktemp("vocabularies")
    made = {"actor": tiny_model(root / "actor"), "large": tiny_model(root / "large", vocab=120)}
    for name in ("same", "swapped", "bare", "bare-large", "few-rows"):
        shutil.copytree(made["large" if name == "bare-large" else "actor"], root / name)
        made[name] = root / name
        weights = root / name / "model.safetensors"
        save_file({**load_file(weights), HEAD: torch.ones(1, 32)}, weights, {"format": "pt"})
    path = root / "swapped" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(values))
    for name in ("bare", "bare-large"):
        (root / name / "tokenizer.json").unlink()
    config = json.loads((root / "few-rows" / "config.json").read_text())
    (root / "few-rows" / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))
    return made


def ppo(folders: dict[str, Path], reward: str):
    return load_graph(
        find_graph("ppo"), [f"model={folders['actor']}", f"reward_model={folders[reward]}", "prompts=4"]
    )


@pytest.mark.parametrize("reward", ["same", "bare"])
def test_equal_vocabularies_pass(folders: dict[str, Path], reward: str) -> None:
    assert vocabulary_problems(ppo(folders, reward)) == []


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            "swapped",
            r"token \d+ of actor is '[ab]', token \d+ of reward is '[ab]'; call reward needs a model",
        ),
        ("large", "actor has no token 100, token 100 of reward is '<unused"),
        ("bare-large", "actor has 100 tokens, reward has 120 tokens"),
        ("few-rows", "reward has embeddings for 90 tokens, actor numbers up to 99"),
    ],
)
def test_other_vocabularies_are_told_with_file_line_and_param(
    folders: dict[str, Path], reward: str, message: str
) -> None:
    problems = {problem.where: problem for problem in vocabulary_problems(ppo(folders, reward))}
    assert set(problems) == {"models.critic.path", "models.reward.path"}  # the critic has the same files
    file = find_graph("ppo")
    parts = file.read_text().split("path: ${reward_model}")
    for where, before in (("models.critic.path", parts[:1]), ("models.reward.path", parts[:2])):
        assert (problems[where].file, problems[where].line) == (str(file), "".join(before).count("\n") + 1)
        assert problems[where].message.endswith("(the value comes from params: reward_model)")
    assert re.search(message, problems["models.reward.path"].message)


def test_check_plan_and_run_refuse(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"model={folders['actor']}", "prompts=4"]
    other = [*overrides, f"reward_model={folders['swapped']}"]
    assert main(["check", "ppo", *other]) == 2
    assert "models.reward.path: token" in capsys.readouterr().err
    with pytest.raises(InputError, match="needs a model with the vocabulary of actor"):
        plan("ppo", devices=1, layouts="d1", overrides=other)
    good = plan("ppo", devices=1, layouts="d1", overrides=[*overrides, f"reward_model={folders['same']}"])
    file = tmp_path / "plan.yaml"
    write_plan(good, file)
    file.write_text(file.read_text().replace(str(folders["same"]), str(folders["swapped"])))
    assert main(["run", str(file), "--run-dir", str(tmp_path / "run")]) == 2
    assert "needs a model with the vocabulary of actor" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tokenized_data_counts_as_its_model(folders: dict[str, Path]) -> None:
    mapping = graph_to_mapping(load_graph(find_graph("sft"), [f"model={folders['actor']}"]))
    mapping["models"]["tokenizer"] = {"path": str(folders["swapped"])}
    mapping["data"]["tokenize"] = "tokenizer"
    (problem,) = vocabulary_problems(load_graph(mapping))
    assert "needs a model with the vocabulary of tokenizer" in problem.message


def test_a_teacher_with_another_tokenizer_is_refused(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Text in other tokens has no log probabilities of the tokens that were drawn: nothing to advise but
    another teacher."""
    model = f"model={folders['actor']}"
    assert main(["check", "distill", model, f"teacher={folders['swapped']}"]) == 2
    told = capsys.readouterr().err
    assert re.search(r"models\.teacher\.path: token \d+ of actor is '[ab]', token \d+ of teacher is", told)
    assert "call teach needs a model with the vocabulary of actor" in told and "retokenize" not in told
    assert main(["check", "distill", model, f"teacher={folders['large']}"]) == 2
    assert "actor has no token 100, token 100 of teacher is '<unused" in capsys.readouterr().err
    assert main(["check", "distill", model, f"teacher={folders['same']}"]) == 0  # the control
