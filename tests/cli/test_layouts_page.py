"""Commands and files of docs/layouts.md: what is cheap runs, the rest parses."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest
from small_cards import llama_card

from planner.cluster import _SPEEDS, _UNITS
from realflow.cli import build_parser, main
from realflow.graph import load_graph, shipped_graphs
from realflow.models.card import config_hash, store
from realflow.planfile import read_plan
from realflow.planfile.flags import FLAGS

PAGE = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def uncut(model_cache: Path) -> None:
    """The shipped graphs' model can be cut here."""
    folder = model_cache / "models" / "smollm2-135m-instruct"
    shutil.copyfile(model_cache / "models" / "small-llama" / "config.json", folder / "config.json")
    store(dataclasses.replace(llama_card(hidden=72, heads=9, kv_heads=3), hash=config_hash(folder)))


def test_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for text in blocks("yaml"):
        name = re.match(r"# (\S+)\n", text)
        assert name
        Path(name[1]).write_text(text)
    ran = 0
    for command in "".join(blocks("bash")).splitlines():
        argv = shlex.split(command)
        argv = argv[argv.index("realflow") + 1 :]
        args, rest = build_parser().parse_known_args(argv)
        assert args.command and all("=" in item for item in rest), command
        if argv[0] in ("plan", "explain"):
            code = main(argv)
            assert (code, capsys.readouterr().err) == (0, ""), command
            ran += 1
    assert ran == 6
    assert read_plan("two-nodes.yaml").cluster.nodes[0].between == 50e9
    assert read_plan("plan.yaml").calls["ref"].after == "offload"


def test_the_model_that_follows() -> None:
    (part,) = (text for text in blocks("yaml") if "follows" in text)
    line = next(line for line in part.splitlines() if "follows" in line)
    text = shipped_graphs()["grpo"].read_text()
    old = "  ref:    # the same model, as it was at the start\n"
    assert old in text
    Path("ema.yaml").write_text(text.replace(old, f"{old}{line}\n"))
    follow = load_graph(Path("ema.yaml")).models["ref"].follows
    assert follow is not None and (follow.model, follow.decay, follow.every) == ("actor", 0.99, 5)


def test_every_flag_and_unit_is_named() -> None:
    assert all(f"`{word}`" in PAGE for word in FLAGS)
    row = next(line for line in PAGE.splitlines() if line.startswith("| `memory`"))
    assert all(re.search(rf"\b{unit}\b", row) for unit in _UNITS)
    bits = [unit for unit in _SPEEDS if unit.endswith("b/s")]
    assert all(unit in PAGE for unit in bits) and len(_SPEEDS) == len(_UNITS) + len(bits)
