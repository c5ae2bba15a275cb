"""Commands, files and Python of docs/planning.md: what needs no measurement runs, the rest parses."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from small_cards import NINE_HEADS, llama_card

from planner.hardware import catalogue
from realflow.cli import build_parser, main
from realflow.models.card import config_hash, store
from realflow.planfile import read_plan

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def cluster(model_cache: Path) -> None:
    """The page's cluster file, and a model that can be cut."""
    folder = model_cache / "models" / "smollm2-135m-instruct"
    (folder / "config.json").write_text(json.dumps(NINE_HEADS))
    store(dataclasses.replace(llama_card(hidden=72, heads=9, kv_heads=3), hash=config_hash(folder)))
    (text,) = blocks("yaml")
    Path("cluster.yaml").write_text(text)


def test_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for command in "".join(blocks("bash")).splitlines():
        argv = shlex.split(command, comments=True)[1:]
        args, rest = build_parser().parse_known_args(argv)
        assert args.command and all("=" in item for item in rest), command
        if argv[0] in ("plan", "explain") and "--profile" not in argv:
            quick = ["--effort", "low"] if argv[0] == "plan" and "--effort" not in argv else []
            code = main([*argv, *quick])
            out, err = capsys.readouterr()
            assert code == 0, (command, err)
            ran += 1
            if "--what-if" in argv:
                rows = [line.split() for line in out.splitlines()]
                shown = {tuple(row[:2]) for row in rows if row and row[0] in ("8", "16")}
                assert shown == {("8", "16"), ("8", "256"), ("16", "16"), ("16", "256")}
    assert ran == 6
    fixed = read_plan("fixed.yaml").calls
    assert (str(fixed["rollout"].layout), fixed["rollout"].ranks) == ("d8t2p1", tuple(range(16)))
    assert (str(fixed["ref"].layout), fixed["ref"].after) == ("d1t2p1", "offload")
    assert read_plan("cluster-plan.yaml").hashes == {"catalogue": catalogue().hash}
    for kind in re.findall(r"`([a-z]\d+\w*(?:-\d+gb)?)`", PAGE.partition("```yaml")[0]):
        assert kind in catalogue().devices, kind


def test_its_python(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code, "planning.md", "exec"), {})
    step, gap, layout = capsys.readouterr().out.split()
    assert float(step) > 0 and 0 <= float(gap) < 1 and layout.startswith("d")
