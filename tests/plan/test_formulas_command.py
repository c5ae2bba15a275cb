"""`realflow explain --formulas`: the expressions and the numbers that it prints."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import sympy
from test_decoder import published

from planner.decoder import read_decoder
from planner.formulas import Cut, layer_parts, pass_of
from planner.formulas.parts import layer_costs, shape_of
from realflow.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "planning-costs.md"
TEXTS = Path(__file__).parents[2] / "experiments" / "planner" / "models"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configs alone stand for the models; no weights, no cards."""
    folder = tmp_path / "cache" / "models"
    for name in ("qwen2.5-1.5b", "qwen3-235b-a22b", "gemma-2-9b"):
        (folder / name).mkdir(parents=True)
        shutil.copy(TEXTS / f"{name}.json", folder / name / "config.json")
    monkeypatch.setenv("REALFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "250")
    return folder


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", *arguments]) == 0
    return capsys.readouterr().out


def rows(text: str, after: str) -> dict[str, list[str]]:
    """The rows of the table whose title begins so."""
    lines = text[text.index(after) :].splitlines()[4:]
    table = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {row[0]: row[1:] for row in table[: table.index([""])]}


def test_expressions_are_those_that_are_counted_with(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed, read back, is what numbers are made of."""
    text = told(capsys, "grpo", "model=gemma-2-9b", "--formulas")
    decoder = read_decoder(published("gemma-2-9b"))
    assert "9,241,705,984 parameters" in text and "attention within 4096 tokens" in text
    names = {str(symbol): symbol for symbol in layer_symbols()}
    for phase in ("forward", "backward", "decode"):
        table = rows(text, f"21 layers: full attention, MLP of 14336 columns; {phase}")
        costs = layer_costs(shape_of(decoder, decoder.layers[1]), phase)  # type: ignore[arg-type]
        assert list(table) == list(costs)
        for name, cost in costs.items():
            for cell, expression in zip(table[name], (cost.flops, cost.read, cost.written), strict=True):
                read = sympy.sympify(cell.replace("·", "*").replace("^", "**"), locals=names)
                assert sympy.expand(read - expression) == 0, (phase, name)
    meanings = rows(text, "Where, on the busiest rank")
    assert meanings["h"] == ["query heads of a rank", "ceiling(heads/t)"]


def layer_symbols() -> tuple[sympy.Symbol, ...]:
    from planner.formulas.symbols import RUNTIME, SHARES

    return (*RUNTIME, *SHARES)


def test_numbers_of_a_layout_that_no_engine_runs(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Context and expert ranks are costed, and it is said that they do not run."""
    graph = ("grpo", "model=qwen3-235b-a22b", "max_new_tokens=1024")
    text = told(capsys, *graph, "--formulas", "--cut", "d4t4p2c2e8")
    assert "no engine runs them yet" in text
    table = rows(text, "ref (infer, d4t4p2c2e8), layers 48 to 93: a micro-batch of 4096 tokens")
    decoder = read_decoder(published("qwen3-235b-a22b"))
    length = float(re.search(r"sequences of (\d+); forward", text)[1])  # type: ignore[index]
    one = pass_of([(length, 4096 / length)])
    parts = layer_parts(decoder, 0, Cut(4, 2, 2, 8), one, "forward")
    assert table["experts"][0] == f"{46 * parts['experts'].flops / 1e12:.2f} T"
    assert table["experts"][1] == f"{46 * parts['experts'].read / 1e9:.2f} G"
    assert re.search(
        "bytes sent: to tensor ranks .*, to context ranks .*, to expert ranks .* G, to neigh", text
    )


@pytest.mark.real_model
def test_numbers_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from realflow.models.paths import find_model

    if find_model("smollm2-135m-instruct") is None:
        pytest.skip("SmolLM2 is not in the cache")
    path = str(tmp_path / "plan.yaml")
    layouts = ["--layout", "d2t2", "--layout", "train=d2p2:recompute"]
    assert main(["plan", "grpo", "steps=1", "--devices", "4", *layouts, "-o", path]) == 0
    capsys.readouterr()
    text = told(capsys, path, "--formulas")
    assert "actor and ref: llama, 30 layers, 134,515,008 parameters" in text
    assert "rollout (generate, d2t2p1), layers 0 to 29: decoding" in text
    assert "train (train, d2t1p2), layers 19 to 29" in text and "forward and recompute" in text
    assert "gradients and new weights, once a minibatch" in text


@pytest.mark.real_model
def test_the_page_s_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from realflow.models.paths import find_model

    if find_model("smollm2-135m-instruct") is None:
        pytest.skip("SmolLM2 is not in the cache")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    for command in block.splitlines():
        assert main(shlex.split(command)[1:]) == 0, command
    assert "d2t3p1c2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ("d4e3", "e3 must divide the 4 data"),
        ("t16", "actor has 12 heads; use t1 to t12"),
        ("p29", "actor has 28 layers"),
        ("d4x2", "no layout"),
        ("d2d2", "no layout"),
        ("t0", "no layout"),
    ],
)
def test_layouts_that_are_refused(
    cache: Path, capsys: pytest.CaptureFixture[str], cut: str, said: str
) -> None:
    assert main(["explain", "grpo", "model=qwen2.5-1.5b", "--formulas", "--cut", cut]) == 2
    assert said in capsys.readouterr().err


def test_what_belongs_to_formulas_alone(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["steps=2"], ["--cut", "d2"]):
        with pytest.raises(SystemExit) as ended:
            main(["explain", "plan.yaml", *words])
        assert ended.value.code == 2 and "only with --formulas" in capsys.readouterr().err


def test_a_config_that_cannot_be_counted(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = published("qwen2.5-1.5b", kv_lora_rank=512)
    (cache / "qwen2.5-1.5b" / "config.json").write_text(json.dumps(config))
    assert main(["explain", "grpo", "model=qwen2.5-1.5b", "--formulas"]) == 2
    message = capsys.readouterr().err
    assert "config.json: kv_lora_rank" in message and "latent attention" in message
