"""What is no reward model is refused by check and plan, from the headers of its files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ppo_tiny import tiny_scorer
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from realflow.cli import main
from realflow.errors import InputError
from realflow.graph import Graph, find_graph, load_graph
from realflow.models.causal import load_model
from realflow.models.fetch import fetch
from realflow.models.fitting import HEAD, check_fitting, wrong_head
from realflow.models.paths import MADE, absent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model, a reward model, one with two labels, and one in several files."""
    root = tmp_path_factory.mktemp("heads")
    found = {"lm": tiny_model(root / "lm"), "reward": tiny_scorer(root / "reward", "float32")}
    tensors = load_file(found["reward"] / "model.safetensors")
    for name, labels in (("two", 2), ("parts", 1), ("two-parts", 2)):
        found[name] = tiny_scorer(root / name, "float32")
        head = tensors[HEAD].repeat(labels, 1)
        rest = {key: value for key, value in tensors.items() if key != HEAD}
        if "parts" in name:
            (root / name / "model.safetensors").unlink()
            save_file(rest, root / name / "model-00001-of-00002.safetensors")
            save_file({HEAD: head}, root / name / "model-00002-of-00002.safetensors")
        else:
            save_file({**rest, HEAD: head}, root / name / "model.safetensors", {"format": "pt"})
    return found


def ppo(folders: dict[str, Path], reward: str, actor: str = "lm") -> Graph:
    overrides = [f"model={folders[actor]}", f"reward_model={folders[reward]}", "prompts=4"]
    return load_graph(find_graph("ppo"), overrides)


@pytest.mark.parametrize("reward", ["reward", "parts"])
def test_reward_models_pass(folders: dict[str, Path], reward: str) -> None:
    check_fitting(ppo(folders, reward))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("lm", "is a LlamaForCausalLM without score.weight; expected a sequence classifier with one label"),
        ("two", "has a head for 2 labels (score.weight); expected a sequence classifier with one label"),
        ("two-parts", "has a head for 2 labels"),
    ],
)
def test_others_are_refused_with_file_line_and_param(
    folders: dict[str, Path], reward: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as caught:
        check_fitting(ppo(folders, reward))
    problem = caught.value.problems[-1]
    critic = ["models.critic.path"] if "labels" in message else []  # it starts from the same files
    assert [one.where for one in caught.value.problems] == [*critic, "models.reward.path"]
    assert message in problem.message and "(the value comes from params: reward_model)" in problem.message
    assert (problem.where, problem.file) == ("models.reward.path", str(find_graph("ppo")))
    overrides = [f"model={folders['lm']}", f"reward_model={folders[reward]}", "prompts=4"]
    for command in ("check", "plan"):
        assert main([command, "ppo", *overrides, *(["--devices", "1"] if command == "plan" else [])]) == 2
        assert f"{problem.file}:{problem.line}: models.reward.path: " in capsys.readouterr().err


def test_a_critic_starts_from_either(folders: dict[str, Path]) -> None:
    """From a language model, whose head starts from zeros, and from a classifier with one label."""
    assert [wrong_head(folders[name], "value") for name in ("lm", "reward")] == ["", ""]
    assert "head for 2 labels" in wrong_head(folders["two"], "value")
    assert all(wrong_head(folder, "lm") == "" for folder in folders.values())


def test_what_loading_says_is_true(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"score.weight has the shape \[2, 32\]; one label needs \[1, 32\]"):
        load_model(folders["two"], dtype="float32", head="reward")
    with pytest.raises(InputError, match=r"lacks 1 tensors, such as score\.weight"):
        load_model(folders["lm"], dtype="float32", head="reward")


def test_headers_are_read_without_torch(folders: dict[str, Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from realflow.models.fitting import wrong_head\n"
        f"assert wrong_head(Path({str(folders['two'])!r}), 'reward'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_how_to_get_the_shipped_reward_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """check, plan, models and models fetch all say the same."""
    monkeypatch.setenv("REALFLOW_CACHE", str(tmp_path))
    (name,) = MADE
    hint = "made once by: python experiments/ppo/reward_model.py"
    assert hint in absent(name)
    model = tiny_model(tmp_path / "model")
    assert main(["check", "ppo", f"model={model}"]) == 0
    assert f"note: models.reward.path: {absent(name)}" in capsys.readouterr().out
    assert main(["plan", "ppo", f"model={model}", "--devices", "1"]) == 2
    assert absent(name) in capsys.readouterr().err
    assert main(["models"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert "not made" in line and hint in line
    with pytest.raises(InputError, match="cannot be fetched, it is made once by"):
        fetch(name)
    assert Path(hint.rpartition(" ")[2]).name in {
        p.name for p in Path(__file__).parents[2].rglob("experiments/ppo/*.py")
    }


def test_broken_files_are_left_to_loading(tmp_path: Path) -> None:
    """It says what is wrong with them."""
    broken = tiny_scorer(tmp_path / "broken", "float32")
    (broken / "model.safetensors").write_bytes(b"no header")
    assert wrong_head(broken, "reward") == ""
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_model(broken, dtype="float32", head="reward")
