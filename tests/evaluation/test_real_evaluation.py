"""Real evaluations: processes, a model, a kill, and the same files whatever happened on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from shapes import write
from tiny import tiny_model

from realflow.api import plan, run
from realflow.cli import main
from realflow.engines.generate import NativeEngine, Prompt
from realflow.engines.samples import Sample as Running
from realflow.errors import InputError
from realflow.graph import find_graph, load_graph
from realflow.runtime.streams import Streams

JUDGE = '''\
import os
import time



def vowels(completions, answer, **columns):
    """1 where the text has a vowel; one problem is not judged. Stands still where the test asks for it."""
    if os.environ.get("STAND_STILL_AT") in list(answer):
        time.sleep(600)
    found = [float(any(c in "aeiou" for c in text)) for text in completions]
    return [None if a == "none" else reward for a, reward in zip(answer, found)]
'''
COUNT = 60
"""Problems: the answers to all of them are more than are drawn at once."""
ROWS = [
    {"question": f"{i}+{i}=", "answer": "none" if i == 4 else str(i), "source": "ab"[i % 2]}
    for i in range(COUNT)
]
ARGUMENTS = (
    "--data", "sums.jsonl", "--reward", "judge:vowels", "--prompt", "{problem}", "--samples", "3",
    "--temperature", "1.0", "--top-p", "1.0", "--max-new-tokens", "6", "--quiet",
)  # fmt: skip

IN_STEPS = """\
import sys
from realflow.cli import main
from realflow.evaluation import graphs
graphs.STEP_TOKENS = 15 * 3 * (6 + 1024)
sys.exit(main(sys.argv[1:]))
"""
"""The command, with steps of 15 problems: the first ones are kept before the last step's are judged."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, problems and a reward."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_model(folder / "model", dtype="float64", seed=3)
    write(folder / "sums.jsonl", ROWS)
    (folder / "judge.py").write_text(JUDGE)
    return folder


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    """An evaluation that nothing has interrupted."""
    before = Path.cwd()
    os.chdir(place)
    try:
        assert main(["evaluate", "model", *ARGUMENTS, "dtype=float64", "--devices", "1", "--layout", "d1",
                     "-o", "whole"]) == 0  # fmt: skip
    finally:
        os.chdir(before)
    return place / "whole"


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_graph_without_training_draws_judges_and_is_summed_up(unbroken: Path) -> None:
    rows = lines(unbroken)
    assert len(rows) == COUNT * 4 and {row["source"] for row in rows} == {"a", "b"}
    assert {row["problem_id"] for row in rows if row["reward"] is None} == {"sums/4"}
    assert all(1 <= row["tokens"] <= 6 and row["finish_reason"] in ("stop", "length") for row in rows)
    results = json.loads((unbroken / "results.json").read_text())
    line = results["scores"]["lines"][-1]
    assert (line["problems"], line["samples"], line["missing"]) == (COUNT, COUNT * 4, 4)
    judged = [row["reward"] for row in rows if not row["greedy"] and row["reward"] is not None]
    assert line["scores"]["pass@1"]["value"] == pytest.approx(sum(judged) / len(judged))
    assert line["scores"]["pass@1"]["problems"] == COUNT - 1
    assert 0 < line["scores"]["pass@1"]["value"] < 1  # or this would show little
    assert list((unbroken / "runs" / "sampled-1" / "checkpoints").iterdir()) == []


def test_greedy_answers_and_draws_are_those_of_the_model(unbroken: Path, place: Path) -> None:
    """Beside the command: the engine, fed the same prompts under the same ids."""
    from transformers import AutoTokenizer

    from realflow.data.text import encode_prompt
    from realflow.graph.types import Sampling
    from realflow.models.causal import load_model

    model = load_model(place / "model", dtype="float64")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    for greedy, first in ((False, 0), (True, 0), (False, 7)):
        engine = NativeEngine(
            model, Sampling(6, temperature=0.0 if greedy else 1.0), slots=4, max_length=64, seed=1,
            eos_ids=[tokenizer.eos_token_id], tokenizer=tokenizer,
        )  # fmt: skip
        numbers = range(1 if greedy else 3)
        engine.feed(
            Prompt(place, tuple(3 * place + k for k in numbers),
                   tuple(encode_prompt(tokenizer, row["question"], True)), draw_id=(place << 32) + first)
            for place, row in enumerate(ROWS)
        )  # fmt: skip
        found: dict[tuple[int, int], str] = {}
        while engine.busy:
            found |= {(f.group_id, f.sample_id % 3): f.completion for f in engine.step()}
        told = {
            (row["draw_id"] >> 32, row["number"]): row["completion"]
            for row in lines(unbroken)
            if row["greedy"] == greedy
        }
        assert (told == found) == (first == 0)  # the control: under other ids other answers are drawn


def test_a_draw_hangs_on_its_draw_id_alone() -> None:
    """The control too: without one, or under another, the ids differ."""
    plain, moved = Prompt(7, (14, 15), (1, 2)), Prompt(7, (14, 15), (1, 2), draw_id=5 << 32)
    assert [Running(plain, k, 4).draw_id for k in (0, 1)] == [14, 15]
    assert [Running(moved, k, 4).draw_id for k in (0, 1)] == [5 << 32, (5 << 32) + 1]


@pytest.mark.full
def test_a_killed_evaluation_goes_on_to_the_same_files_on_two_ranks(
    unbroken: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with SIGKILL while answers come; what is missing is then drawn under another layout."""
    monkeypatch.chdir(place)
    argv = ["evaluate", "model", *ARGUMENTS, "dtype=float64", "-o", "killed"]
    command = [sys.executable, "-c", IN_STEPS, *argv, "--devices", "1", "--layout", "d1"]
    drawn = place / "killed" / "runs" / "sampled-1" / "samples.jsonl"
    process = subprocess.Popen(command, env={**os.environ, "STAND_STILL_AT": str(COUNT - 1)})
    try:
        deadline = time.monotonic() + 120
        while not (drawn.is_file() and drawn.read_bytes().count(b"\n")) and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive  # what an evaluation started ends with it
    before = drawn.read_bytes().count(b"\n")
    assert 0 < before < COUNT * 3 and not (place / "killed" / "results.json").exists()
    assert main([*argv, "--devices", "2", "--layout", "d2"]) == 0
    assert kept(place / "killed") == kept(unbroken)
    rest = drawn.parents[1] / "sampled-2" / "samples.jsonl"
    assert rest.read_bytes().count(b"\n") == COUNT * 3 - before  # nothing that was there came again


@pytest.mark.parametrize("found", [True, -1, 1 << 62, "7", None])
def test_a_draw_id_is_a_number_that_leaves_room_for_samples(found: object) -> None:
    call = SimpleNamespace(reads={"prompt": "prompt", "draw_id": "place"})
    data = SimpleNamespace(row=lambda group: {"prompt": "?", "place": found})
    streams = Streams(SimpleNamespace(graph=None), 0, None, None, data, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"prompt 3: found the draw_id {found!r}"):
        streams._draw_id(call, 3)  # type: ignore[arg-type]


@pytest.mark.full
@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_the_shipped_graphs_run_by_themselves(name: str, place: Path, tmp_path: Path) -> None:
    """Nothing is trained, so that nothing is saved; the samples are what there is."""
    settings = ["prompts=3", "samples=2", "max_new_tokens=4", f"model={place / 'model'}"]
    made = plan(load_graph(find_graph(name), settings), devices=1)
    result = run(made, run_dir=tmp_path / "run", quiet=True)
    rows = lines(result.run_dir)
    assert sorted(row["sample_id"] for row in rows) == list(range(6))
    assert all({"prompt", "completion", "finish_reason", "length"} <= set(row) for row in rows)
    assert all(("rewards" in row) == (name == "evaluate") for row in rows)
    assert "response_length/mean" in result.metrics[0] and len(result.metrics) == 1
    assert list((result.run_dir / "checkpoints").iterdir()) == []


@pytest.mark.full
@pytest.mark.real_model
def test_the_small_real_model_on_sums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--samples", "2", "--limit", "4", "--max-new-tokens", "12", "--devices", "1", "--layout", "d1"]
    out = tmp_path / "out"
    assert main(["evaluate", "smollm2-135m-instruct", *argv, "--quiet", "-o", str(out)]) == 0
    rows = lines(out)
    assert len(rows) == 12 and all(row["prompt_tokens"] == 46 for row in rows)
    assert all(row["reward"] in (0.0, 1.0) for row in rows)
    assert any(row["completion"].strip() for row in rows)
    assert "pass@2" in capsys.readouterr().out
