"""What the commands tell of a graph or a plan: notes, tables, cuts, and plans that were edited by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from calling import Launched, ok, refused

import realflow
from realflow.planfile import read_plan

pytestmark = pytest.mark.usefixtures("model_cache", "launched")


def test_check_notes_what_should_be_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "note:" not in ok(capsys, "check", "grpo")
    assert "note: the run takes 45000 prompts, but the data has 2800 at most" in ok(
        capsys, "check", "grpo", "prompts=1000"
    )
    assert "note: a step takes 3000 prompts" in ok(capsys, "check", "grpo", "prompts=3000", "steps=1")
    grpo = Path(realflow.__file__).parent / "graphs" / "grpo.yaml"
    Path("async.yaml").write_text(grpo.read_text().replace("max_staleness: 0", "max_staleness: 1"))
    assert "cannot run yet: it can be planned, but realflow run will refuse it" in ok(
        capsys, "check", "async.yaml"
    )


def test_what_does_not_fit_is_not_invited_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.yaml").write_text("nodes:\n  - {name: a, devices: 2, memory: 5 MiB}\n")
    out = ok(capsys, "plan", "grpo", "--cluster", "small.yaml", "--layout", "d2", "-o", "p.yaml")
    assert "realflow run" not in out and "not expected to fit" in out
    assert "note: Memory: ranks 0-1 are expected to need" in out
    assert "realflow explain p.yaml" in out


def test_tables_are_whole_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ok(
        capsys,
        "plan",
        "grpo",
        "--devices",
        "3",
        "--layout",
        "d1@2",
        "--layout",
        "rollout=d2@0-1",
        "-o",
        "p.yaml",
    )
    lines = ok(capsys, "explain", "p.yaml").splitlines()
    assert max(map(len, lines)) <= 80
    shown = "\n".join(lines)
    assert "rewards.last_number" in shown and "d2t1p1" in shown and "activations" in shown
    assert "seconds" in next(line for line in lines if "layout" in line and "ranks" in line)


def test_a_model_beside_the_graph_goes_before_the_current_folder(
    capsys: pytest.CaptureFixture[str], model_cache: Path
) -> None:
    grpo = (Path(realflow.__file__).parent / "graphs" / "grpo.yaml").read_text()
    source = model_cache / "models" / "smollm2-135m-instruct" / "config.json"
    for folder in ("project/tiny", "tiny", "here"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text(source.read_text())
    Path("project/mine.yaml").write_text(grpo.replace("model: smollm2-135m-instruct", "model: tiny"))
    graph = realflow.load_graph("project/mine.yaml")
    assert graph.models["actor"].path == str(Path("project/tiny").resolve())
    assert realflow.load_graph("project/mine.yaml", ["model=here"]).models["actor"].path == "here"
    assert "note:" not in ok(capsys, "check", "project/mine.yaml", "model=here")


def test_how_models_are_cut(
    capsys: pytest.CaptureFixture[str], model_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = "plan grpo model=small-llama --devices 4 --layout d2t2 --layout train=t2p2:zero_bubble,recompute"
    ok(capsys, *argv.split(), "--layout", "ref=d1@3:offload", "-o", "p.yaml")
    train = read_plan("p.yaml").calls["train"]
    assert (train.schedule, train.recompute, train.sequence_parallel) == ("zero_bubble", True, False)
    lines = [re.sub(r" +", " ", line.strip()) for line in ok(capsys, "explain", "p.yaml").splitlines()]
    shown = "\n".join(lines)
    assert re.search(r"^train train actor 0-3 d1t2p2 4096 zero_bubble recompute [\d.]+$", shown, re.M)
    assert re.search(r"^ref infer ref 3 d1t1p1 4096 offload [\d.]+$", shown, re.M)
    assert "actor (rollout) 0 0-3 embedding, 0-3, head 4+5 3 each" in lines
    assert "actor (train) 0 0-1 embedding, 0-1 4+5 3 each" in lines
    assert "actor (train) 1 2-3 2-3, head 4+5 3 each" in lines
    monkeypatch.setenv("COLUMNS", "80")
    narrow = ok(capsys, "explain", "p.yaml").splitlines()
    assert max(map(len, narrow)) <= 80
    assert any(line.strip() == "recompute" for line in narrow), "a flag is one word"
    for path in (model_cache / "cards").iterdir():
        path.unlink()
    assert "How actor is cut: its card is not on this machine." in ok(capsys, "explain", "p.yaml")


@pytest.mark.parametrize("command", ["run", "explain"])
def test_a_plan_by_hand_that_a_model_cannot_follow(
    capsys: pytest.CaptureFixture[str], command: str, launched: Launched
) -> None:
    """Before any process starts: the plan keeps all rules, but 9 heads cannot be cut over 12 ranks."""
    ok(capsys, "plan", "grpo", "model=small-llama", "--devices", "12", "--layout", "d12", "-o", "p.yaml")
    text = Path("p.yaml").read_text()
    old = "layout: d12t1p1\n    engine: infer"
    assert old in text
    Path("p.yaml").write_text(text.replace(old, old.replace("d12t1p1", "d1t12p1")))
    (line,) = refused(capsys, command, "p.yaml")
    number = 1 + next(
        i for i, found in enumerate(Path("p.yaml").read_text().splitlines()) if "d1t12p1" in found
    )
    assert line.startswith(f"realflow: p.yaml:{number}: calls.ref.layout: d1t12p1 cannot cut ref: ")
    assert "it has 9 attention heads; t12 needs at least 12: use t1 to t9" in line
    assert "Of 12 ranks these work: d1t6p2, d2t6p1, " in line
    assert launched.calls == []


def test_a_plan_that_was_edited_is_explained_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    ok(capsys, "plan", "grpo", "model=small-llama", "--devices", "2", "--layout", "d2", "-o", "p.yaml")
    first = ok(capsys, "explain", "p.yaml")
    assert "anew" not in first and "After:" not in first
    old = "layout: d2t1p1\n    engine: infer\n    micro_batch_tokens: 4096\n    after: keep"
    new = old.replace("d2t1p1", "d1t2p1").replace("keep", "offload")
    text = Path("p.yaml").read_text().replace(old, new)
    Path("p.yaml").write_text(text.replace("slots: 32\n    after: keep", "slots: 32\n    after: offload"))
    then = ok(capsys, "explain", "p.yaml")
    assert "note: Memory is estimated anew: that in the file is of other calls." in then
    assert "note: After: rollout says offload, but on ranks 0-1 train uses the same weights" in then
    weights = [re.search(r"weights +([\d.]+ KiB)", out) for out in (first, then)]
    assert weights[0] and weights[1] and weights[0][1] != weights[1][1]


def test_all_problems_of_a_plan_have_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    ok(capsys, "plan", "grpo", "--devices", "1", "-o", "p.yaml")
    text = (
        Path("p.yaml")
        .read_text()
        .replace("engine: python", "engine: cobra")
        .replace("format: 1", "format: x")
    )
    Path("p.yaml").write_text(text.replace("format: x", "format: 1"))
    lines = refused(capsys, "explain", "p.yaml")
    assert len(lines) == 2 and all(
        re.match(r"realflow: p\.yaml:\d+: calls\.\w+\.engine: ", line) for line in lines
    )


def test_a_card_that_is_made_is_said_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model_cache: Path
) -> None:
    found = next((model_cache / "cards").glob("*.json"))
    kept = {path.name: path.read_text() for path in (model_cache / "cards").iterdir()}
    for path in (model_cache / "cards").iterdir():
        path.unlink()

    def make(folder: Path) -> None:
        assert "realflow: making the card of smollm2-135m-instruct" in capsys.readouterr().err, "before"
        for name, text in kept.items():
            found.with_name(name).write_text(text)

    monkeypatch.setattr("realflow.models.card._make", make)
    ok(capsys, "plan", "grpo", "--devices", "1", "--layout", "d1", "-o", "p.yaml")


def test_bytes_that_the_layouts_contradict_are_counted_anew(capsys: pytest.CaptureFixture[str]) -> None:
    ok(
        capsys,
        "plan",
        "grpo",
        "model=small-llama",
        "--devices",
        "2",
        "--layout",
        "train=d1@0",
        "-o",
        "p.yaml",
    )
    first, text = ok(capsys, "explain", "p.yaml"), Path("p.yaml").read_text()
    assert "counted anew" not in first
    Path("p.yaml").write_text(re.sub(r"bytes: \d+\n", "bytes: 1\n", text))
    then = ok(capsys, "explain", "p.yaml")
    assert "note: Reallocation: bytes are counted anew; those in the file are of other layouts." in then
    row = next(line for line in first.splitlines() if "train -> rollout" in line)
    assert row in then.splitlines() and "1 B" not in then
    hashes = re.search(r"\ncards:\n((  .*\n)+)", text)
    assert hashes
    other = re.sub(r"'?\b[0-9a-f]{12,}\b'?", f"'{'0' * 16}'", hashes[1])
    Path("p.yaml").write_text(text.replace(hashes[1], other))
    bare = " ".join(ok(capsys, "explain", "p.yaml").split())
    assert "Bytes are those of the file, and not checked: the card of actor and ref is not on this" in bare
