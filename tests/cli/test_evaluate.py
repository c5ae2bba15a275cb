"""`realflow evaluate` without a model: what it plans, keeps, resumes, refuses and prints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_runs import Launcher

import realflow.launch.local
from realflow.cli import main
from realflow.graph import find_graph
from realflow.planfile import Plan

ROWS = [{"problem": f"What is {i} + 1?", "answer": str(i + 1), "source": f"set-{i % 2}"} for i in range(10)]
QUICK = ("--devices", "1", "--layout", "d1", "--quiet", "--reward", "rewards.boxed")


@pytest.fixture(autouse=True)
def launcher(model_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """No test of this file starts processes. A file of problems lies in the current folder."""
    stands_in = Launcher()
    monkeypatch.setattr(realflow.launch.local, "supervise", stands_in.supervise)
    write("sums.jsonl", ROWS)
    return stands_in


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(capsys: pytest.CaptureFixture[str], *argv: str, model: str = "small-llama") -> str:
    """Evaluate on sums.jsonl with 4 samples; return what is printed."""
    data = () if "--data" in argv else ("--data", "sums.jsonl")
    samples = () if "--samples" in argv else ("--samples", "4")
    code = main(["evaluate", model, *data, *samples, *QUICK, *argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    assert main(["evaluate", *argv]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.startswith("realflow: ")
    return err


def lines(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


def kept(folder: str) -> dict[str, bytes]:
    """The files of an evaluation, without its runs."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_what_is_drawn_and_kept(capsys: pytest.CaptureFixture[str], launcher: Launcher) -> None:
    out = evaluate(capsys, "-o", "out", "--seed", "7")
    drawn, greedy = (plan.graph for plan in launcher.plans)
    assert (drawn.prompts, drawn.samples, drawn.steps, drawn.seed) == (10, 4, 1, 7)
    sampling = drawn.calls[0].sampling
    assert sampling is not None and (sampling.temperature, sampling.top_p) == (0.6, 0.95)
    sampling = greedy.calls[0].sampling
    assert sampling is not None and (greedy.samples, sampling.temperature, sampling.top_p) == (1, 0.0, 1.0)
    assert drawn.calls[0].reads["draw_id"] == "draw_id" and drawn.calls[1].decl.name == "rewards.boxed"
    rows = lines("out")
    assert len(rows) == 50 and list(rows[0]) == [
        "problem_id", "source", "number", "greedy", "seed", "draw_id", "completion", "reward",
        "finish_reason", "tokens", "prompt_tokens",
    ]  # fmt: skip
    assert [(row["problem_id"], row["number"], row["greedy"]) for row in rows[5:10]] == [
        ("sums/1", 0, False), ("sums/1", 1, False), ("sums/1", 2, False), ("sums/1", 3, False),
        ("sums/1", 0, True),
    ]  # fmt: skip
    assert {row["seed"] for row in rows} == {7}
    results = json.loads(Path("out/results.json").read_text())
    (first, second, everything) = results["scores"]["lines"]
    assert (first["name"], second["name"], everything["name"]) == ("set-0", "set-1", "all")
    mean = sum(row["reward"] for row in rows if not row["greedy"]) / 40
    assert everything["scores"]["pass@1"]["value"] == pytest.approx(mean)
    assert everything["scores"]["pass@1"]["low"] < mean < everything["scores"]["pass@1"]["high"]
    page = Path("out/results.md").read_text()
    for text in ("4 answers at temperature 0.6, top_p 0.95, seed 7", "| all | 10 |", "rewards.boxed"):
        assert text in page
    for text in ("pass@4", "greedy", "set-1", "results: out/results.md"):
        assert text in out
    problems = [json.loads(line) for line in Path("out/problems.jsonl").read_text().splitlines()]
    assert problems[3]["answer"] == "4" and "What is 3 + 1?" in problems[3]["prompt"]


def test_a_stopped_evaluation_goes_on_to_the_same_files(
    capsys: pytest.CaptureFixture[str], launcher: Launcher
) -> None:
    evaluate(capsys, "-o", "whole")
    launcher.stop_after, launcher.drawn = 6, 0
    argv = ["small-llama", "--data", "sums.jsonl", "--samples", "4", *QUICK, "-o", "broken"]
    err = refused(capsys, *argv, code=1)
    assert "rank 0 has died" in err and "the same command goes on in broken" in err
    assert len(lines("broken")) == 24 and not Path("broken/results.json").exists()
    launcher.plans.clear()
    evaluate(capsys, "-o", "broken")
    assert launcher.drawn == 50  # what was there was not drawn again
    assert [plan.graph.prompts for plan in launcher.plans] == [4, 10]
    assert launcher.plans[0].graph.data.options["only"] == [6, 7, 8, 9]
    assert kept("broken") == kept("whole")
    assert sorted(path.name for path in Path("broken/runs").iterdir()) == [
        "greedy-1", "sampled-1", "sampled-2",
    ]  # fmt: skip
    launcher.plans.clear()
    evaluate(capsys, "-o", "broken")
    assert launcher.plans == [] and kept("broken") == kept("whole")


def test_what_only_a_run_has_recorded_is_found(
    capsys: pytest.CaptureFixture[str], launcher: Launcher
) -> None:
    """A kill of the whole process leaves the end of samples.jsonl in the run's own file."""
    evaluate(capsys, "-o", "whole")
    shutil.copytree("whole", "killed")
    text = Path("killed/samples.jsonl").read_text()
    Path("killed/samples.jsonl").write_text(text[: len(text) // 2])  # in the middle of a line
    for name in ("results.json", "results.md"):
        (Path("killed") / name).unlink()
    launcher.plans.clear()
    evaluate(capsys, "-o", "killed")
    assert launcher.plans == [] and kept("killed") == kept("whole")


def test_a_changed_setting_is_refused_with_what_differs(
    capsys: pytest.CaptureFixture[str], launcher: Launcher
) -> None:
    evaluate(capsys, "-o", "out")
    before = kept("out")
    base = ["small-llama", "--data", "sums.jsonl", *QUICK, "-o", "out"]
    for changed, told in (
        (["--samples", "8"], "calls.rollout.samples was 4 and is 8"),
        (["--samples", "4", "--temperature", "1"], "calls.rollout.temperature was 0.6 and is 1.0"),
        (["--samples", "4", "--seed", "2"], "seed was 1 and is 2"),
        (["--samples", "4", "--no-greedy"], "greedy was True and is False"),
        (["--samples", "4", "--limit", "5"], "data.problems was 10 and is 5"),
        (["--samples", "4", "max_new_tokens=9"], "calls.rollout.max_new_tokens was 64 and is 9"),
    ):
        assert told in refused(capsys, *base, *changed)
    write("sums.jsonl", [{**row, "answer": "0"} for row in ROWS])
    assert "data.digest was" in refused(capsys, *base, "--samples", "4")
    write("sums.jsonl", ROWS)
    config = next(Path("../cache/models/small-llama").glob("config.json"))
    config.write_text(config.read_text() + "\n")
    assert "weights.actor.config.json" in refused(capsys, *base, "--samples", "4")
    assert kept("out") == before
    launcher.plans.clear()
    evaluate(capsys, "--pass-at", "2", "--solved", "0.5", "-o", "elsewhere")  # these may change later
    evaluate(capsys, "--pass-at", "3,4", "-o", "elsewhere")
    assert len(launcher.plans) == 2
    assert "pass@3" in Path("elsewhere/results.md").read_text()


def test_the_draws_of_a_problem_hang_on_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer problems, fewer samples or no greedy answer: what is drawn is what was drawn."""
    evaluate(capsys, "-o", "whole")
    evaluate(capsys, "-o", "few", "--limit", "3", "--samples", "2", "--no-greedy")
    whole = {(r["problem_id"], r["number"]): r["completion"] for r in lines("whole") if not r["greedy"]}
    few = {(r["problem_id"], r["number"]): r["completion"] for r in lines("few")}
    assert len(few) == 6 and few.items() <= whole.items()


def test_against_another_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(capsys, "-o", "first")
    write("sums.jsonl", [*ROWS[2:], {"problem": "unjudged", "answer": "1", "source": "set-0"}])
    out = evaluate(capsys, "-o", "second", "--seed", "2", "--columns", "id=problem")
    assert "missing" in out and "5 of 45 answers have no reward" in out
    argv = ("--data", "sums.jsonl", "--samples", "4", *QUICK, "--columns", "id=problem")
    err = refused(capsys, "small-llama", *argv, "-o", "x", "--against", "first")
    assert "no problem in common" in err
    write("sums.jsonl", ROWS)
    out = evaluate(capsys, "-o", "third", "--seed", "2", "--against", "first")
    assert "Higher than first by" in out
    less = json.loads(Path("third/results.json").read_text())["against"]["lines"][-1]
    means = [sum(r["reward"] for r in lines(f) if not r["greedy"]) / 40 for f in ("third", "first")]
    assert less["scores"]["pass@1"]["value"] == pytest.approx(means[0] - means[1])
    assert less["scores"]["greedy"]["value"] == 0
    itself = evaluate(capsys, "-o", "third", "--seed", "2", "--against", "third")
    assert "+0.000" in itself


def test_greedy_alone_and_more_steps_than_one(
    capsys: pytest.CaptureFixture[str], launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = evaluate(capsys, "-o", "out", "--samples", "0")
    assert len(launcher.plans) == 1 and "pass@" not in out and "greedy" in out
    evaluate(capsys, "-o", "whole")
    monkeypatch.setattr("realflow.evaluation.graphs.STEP_TOKENS", 4 * 4 * (64 + 1024))
    launcher.plans.clear()
    evaluate(capsys, "-o", "steps")
    assert (launcher.plans[0].graph.prompts, launcher.plans[0].graph.steps) == (4, 3)
    assert kept("steps") == kept("whole")  # the two problems that came again have the same answers


def test_a_graph_of_the_users(capsys: pytest.CaptureFixture[str], launcher: Launcher) -> None:
    Path("mine").mkdir()
    Path("mine/judge.py").write_text(
        "def exact(completions, **columns):\n    return [1.0 for _ in completions]\n"
    )
    Path("mine/own.yaml").write_text(
        "name: own\nmodels: {m: {path: small-llama}}\nsteps: 5\nseed: 3\n"
        "data: {source: jsonl, path: p.jsonl, fields: {prompt: q, answer: a, id: name}, max_length: 99,\n"
        "  system: Be brief.}\n"
        "calls:\n"
        "  say: {model: m, op: generate, batch: 2 prompts, samples: 2, max_new_tokens: 5, temperature: 0.5}\n"
        "  judge: {op: function, use: 'judge:exact'}\n"
    )
    write("mine/p.jsonl", [{"q": "1+1", "a": "2", "name": "one"}, {"q": "1+2", "a": "3", "name": "two"}])
    code = main(["evaluate", "mine/own.yaml", "--devices", "1", "--layout", "d1", "--quiet"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    graph = launcher.plans[0].graph
    assert (graph.prompts, graph.samples, graph.steps, graph.seed) == (2, 2, 1, 3)
    assert (
        graph.data.prompt_tokens == 99
        and graph.data.system == "Be brief."
        and graph.calls[1].decl.name == "judge:exact"
    )
    assert Path(graph.folder) == Path("mine").resolve()
    assert {row["problem_id"] for row in lines("evaluations/mine-own")} == {"p/one", "p/two"}
    assert "results: evaluations/mine-own/results.md" in captured.out


def test_stages_of_a_length_are_for_training(capsys: pytest.CaptureFixture[str], launcher: Launcher) -> None:
    text = find_graph("evaluate").read_text()
    for old, new in (
        ("max_new_tokens: ${max_new_tokens}", "max_new_tokens: [[2, 16], [null, 48]]"),
        ("  max_new_tokens: 64\n", ""),
        ("path: ${model}", "path: small-llama"),
        ("  model: smollm2-135m-instruct  # a name of `realflow models`, a folder, or a hub id\n", ""),
    ):
        assert old in text
        text = text.replace(old, new)
    Path("staged.yaml").write_text(text)
    evaluate(capsys, "-o", "out", model="staged.yaml")
    sampling = launcher.plans[0].graph.calls[0].sampling
    assert sampling is not None and sampling.limit(0) == 48


def test_a_run_that_lacks_answers_is_no_evaluation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(plan: Plan, run_dir: Path, *, quiet: bool = False) -> None:
        run_dir.mkdir(parents=True)

    monkeypatch.setattr(realflow.launch.local, "supervise", forgets)
    err = refused(capsys, "small-llama", "--limit", "3", *QUICK, "-o", "out", code=1)
    assert "3 problems lack answers" in err and not Path("out/results.json").exists()


def test_humaneval_gets_the_head_of_the_function_as_it_is(
    capsys: pytest.CaptureFixture[str], launcher: Launcher
) -> None:
    Path("judge.py").write_text(
        "def score(completions, prompt, problem, test, entry_point):\n    return [0.0 for _ in prompt]\n"
    )
    head = 'def f(a):\n    """Add one."""\n'
    write("he.jsonl", [{"task_id": "HumanEval/0", "prompt": head, "test": "t", "entry_point": "f"}])
    evaluate(capsys, "--data", "he.jsonl", "--reward", "judge:score", "-o", "out")
    graph = launcher.plans[0].graph
    assert {"problem", "test", "entry_point"} <= set(graph.data.fields)
    assert head in json.loads(Path("out/problems.jsonl").read_text())["prompt"]
    assert lines("out")[0]["problem_id"] == "he/HumanEval/0"


def test_models_of_runs(capsys: pytest.CaptureFixture[str], launcher: Launcher) -> None:
    model = Path("../cache/models/small-llama").resolve()
    for step in (2, 10):
        shutil.copytree(model, f"runs/first/checkpoints/step-{step:06d}/actor")
    newest = Path("runs/first/checkpoints/step-000010/actor").resolve()
    for name in ("runs/first", "runs/first/checkpoints/step-000010", str(newest)):
        launcher.plans.clear()
        evaluate(capsys, "-o", f"out-{len(name)}", model=name)
        assert launcher.plans[0].graph.models["actor"].path == str(newest)
    evaluate(capsys, model="runs/first")
    assert Path("evaluations/first-sums/results.md").is_file()
    shutil.copytree(model, "runs/first/checkpoints/step-000010/critic")
    assert "several models in it; name one of" in refused(capsys, "runs/first", *QUICK)
    Path("runs/new/checkpoints").mkdir(parents=True)
    assert "no checkpoint yet" in refused(capsys, "runs/new", *QUICK)


WRONG = {
    "a graph that trains": (["grpo"], "call train trains"),
    "a graph that judges nothing": (["generate"], "no call writes 'rewards'"),
    "an unknown graph": (["mine.yaml"], "no such file"),
    "an unknown model": (["small-lama"], "did you mean small-llama"),
    "an unknown reward": (["small-llama", "--reward", "rewards.boxes"], "rewards.boxed"),
    "an unknown param": (["small-llama", "tempersture=1"], "did you mean 'temperature'"),
    "k too large": (["small-llama", "--samples", "4", "--pass-at", "8"], "numbers from 1 to the 4 samples"),
    "no samples": (["small-llama", "--samples", "0", "--no-greedy"], "leave nothing to draw"),
    "samples below 0": (["small-llama", "--samples", "-1"], "samples"),
    "a greedy temperature": (["small-llama", "--temperature", "0"], "at temperature 0 all answers are alike"),
    "top_p": (["small-llama", "--top-p", "1.5"], "calls.rollout.top_p"),
    "a limit below 0": (["small-llama", "--limit", "-1"], "expected 0 (all) or more"),
    "no evaluation to compare with": (["small-llama", "--against", "sums.jsonl"], "no samples.jsonl"),
    "columns without a file": (["small-llama", "--columns", "answer=a"], "--columns: is for problems"),
    "a role without a column": (
        ["small-llama", "--data", "sums.jsonl", "--columns", "answer"], "expected a role and its column"
    ),
    "a folder of something else": (["small-llama", "-o", "../cache"], "holds no evaluation"),
    "devices and a cluster": (
        ["small-llama", "--devices", "1", "--cluster", "c.yaml"], "not both"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_drawn(
    case: str, capsys: pytest.CaptureFixture[str], launcher: Launcher
) -> None:
    argv, message = WRONG[case]
    assert message in refused(capsys, *argv)
    assert launcher.plans == [] and not Path("evaluations/small-lama").exists()
