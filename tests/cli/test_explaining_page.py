"""Commands of docs/explaining.md."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest
from small_cards import llama_card

from realflow.cli import main
from realflow.models.card import config_hash, store

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explaining.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def cut(model_cache: Path) -> None:
    """The shipped graphs' model can be cut here."""
    folder = model_cache / "models" / "smollm2-135m-instruct"
    shutil.copyfile(model_cache / "models" / "small-llama" / "config.json", folder / "config.json")
    store(dataclasses.replace(llama_card(hidden=72, heads=9, kv_heads=3), hash=config_hash(folder)))


def test_its_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    commands = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    shown = ""
    for command in commands:
        name, *argv = shlex.split(command)
        assert name == "realflow" and main(argv) == 0, capsys.readouterr().err
        shown += capsys.readouterr().out
    assert len(commands) == 5
    assert Path("plan.html").is_file()
    for words in ("Timeline of a step, as predicted", "Critical path", "What would shorten a step"):
        assert shown.count(words) >= 3 and words.partition(",")[0] in PAGE, words


def test_what_it_says_of_the_scenarios() -> None:
    """Its options are the script's, and there are sixteen."""
    folder = ROOT / "experiments" / "planner"
    script, cases = (folder / "scenarios.py").read_text(), (folder / "cases.py").read_text()
    used = {word for line in PAGE.splitlines() if "scenarios.py" in line for word in line.split()}
    assert {word for word in used if word.startswith("--")} <= set(re.findall(r'"(--[\w-]+)"', script))
    assert all(f'"{name}"' in cases for name in ("grpo-1.5b-8", "ppo-7b-7b-128"))
