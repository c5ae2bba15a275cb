"""The commands: what they print, what they write, and how they refuse.

Nothing here starts a run: the launcher and the worker are replaced wherever `realflow run` is used.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import realflow
from realflow.cli import build_parser, main
from realflow.errors import RunError
from realflow.graph import load_graph
from realflow.planfile import Plan, read_plan

COMMANDS = ("check", "draw", "graphs", "plan", "explain", "run", "evaluate", "report", "models", "profile")
pytestmark = pytest.mark.usefixtures("model_cache")


@dataclass
class Launched:
    """What was asked of the launcher or the worker that stand in for the real ones."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    error: BaseException | None = None
    code: int = 0


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """No test of this file can start processes: both doors lead here."""
    seen = Launched()

    def supervise(plan: Plan, run_dir: Path, *, quiet: bool = False, restarts: int = 0) -> object:
        seen.calls.append((plan, run_dir, quiet))
        if seen.error is not None:
            raise seen.error
        return types.SimpleNamespace(run_dir=run_dir, metrics=[{"step": 0}])

    def worker_main(plan_path: Path, run_dir: Path) -> int:
        seen.calls.append((plan_path, run_dir))
        return seen.code

    def module(name: str, **content: object) -> None:
        fake = types.ModuleType(name)
        vars(fake).update(content)
        monkeypatch.setitem(sys.modules, name, fake)
        package, _, short = name.rpartition(".")
        monkeypatch.setattr(sys.modules[package], short, fake, raising=False)

    import realflow.launch
    import realflow.runtime  # noqa: F401

    module("realflow.launch.local", supervise=supervise)
    module("realflow.runtime.worker", main=worker_main)
    return seen


def ok(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must succeed; return what it printed."""
    code = main(argv)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> list[str]:
    """Run a command that must fail; return the lines on stderr."""
    found = main(argv)
    captured = capsys.readouterr()
    assert found == code
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert lines and all(line.startswith("realflow: ") for line in lines)
    return lines


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    out = ok(capsys, "check", "grpo", "prompts=4")
    assert out.startswith("grpo: correct. 45 steps of 4 prompts x 8 samples")
    assert "32 samples a step" in ok(capsys, "check", "grpo", "--explain", "batch", "prompts=4")
    assert "is not on this machine" in ok(capsys, "check", "grpo", "model=org/missing")


def test_draw(capsys: pytest.CaptureFixture[str]) -> None:
    assert ok(capsys, "draw", "grpo").startswith("flowchart")
    for name, begin in (("g.svg", "<svg"), ("g.mmd", "flowchart"), ("g.md", "```mermaid\nflowchart")):
        assert ok(capsys, "draw", "grpo", "-o", name) == f"{name}\n"
        assert begin in Path(name).read_text()[:200]


def test_graphs_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    names = {line.split()[0] for line in ok(capsys, "graphs").splitlines()}
    assert {"grpo", "sft"} <= names
    assert re.search(r"smollm2-135m-instruct +\d+ MB +cached", ok(capsys, "models"))
    assert "is in the cache" in ok(capsys, "models", "fetch", "smollm2-135m-instruct")


def test_plan_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    argv = shlex.split(
        "plan grpo steps=3 --devices 3 --layout rollout=d2@0-1 lr=2e-5 --layout d1@2 -o p.yaml"
    )
    assert "realflow run p.yaml" in ok(capsys, *argv)
    plan = read_plan("p.yaml")
    assert (plan.graph.steps, plan.graph.models["actor"].optimizer.lr) == (3, 2e-5)  # type: ignore[union-attr]
    assert (plan.calls["rollout"].ranks, plan.calls["train"].ranks) == ((0, 1), (2,))
    shown = ok(capsys, "explain", "p.yaml")
    for text in (
        "rollout",
        "d2t1p1",
        "train -> rollout",
        "weights",
        "kv_cache",
        "optimizer",
        "to spare",
        "note:",
    ):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_a_plan_goes_to_stdout_and_is_the_same_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    first = ok(capsys, "plan", "grpo", "--devices", "2")
    assert first == ok(capsys, "plan", "grpo", "--devices", "2")
    Path("again.yaml").write_text(first)
    ok(capsys, "explain", "again.yaml")


def test_run_a_graph(capsys: pytest.CaptureFixture[str], launched: Launched) -> None:
    assert ok(capsys, "run", "grpo", "steps=2", "--devices", "1", "--quiet") == f"done: {Path('runs/grpo')}\n"
    ((plan, run_dir, quiet),) = launched.calls
    assert (plan.graph.steps, plan.world_size, run_dir, quiet) == (2, 1, Path("runs/grpo"), True)


def test_run_directories(capsys: pytest.CaptureFixture[str], launched: Launched) -> None:
    ok(capsys, "plan", "grpo", "--devices", "1", "-o", "p.yaml")
    Path("runs/grpo").mkdir(parents=True)
    Path("runs/full").mkdir()
    Path("runs/full/file").write_text("")
    Path("runs/empty").mkdir()
    for options in ((), ("--name", "first"), ("--run-dir", "there"), ("--name", "empty")):
        ok(capsys, "run", "p.yaml", *options)
    assert [str(call[1]) for call in launched.calls] == ["runs/grpo-2", "runs/first", "there", "runs/empty"]
    assert "exists already" in refused(capsys, "run", "p.yaml", "--name", "full")[0]
    assert "no name for a folder" in refused(capsys, "run", "p.yaml", "--name", "../up")[0]
    assert "not both" in refused(capsys, "run", "p.yaml", "--name", "a", "--run-dir", "b")[0]
    assert len(launched.calls) == 4


def test_a_failed_run_is_1(capsys: pytest.CaptureFixture[str], launched: Launched) -> None:
    launched.error = RunError("rank 1 has died during train@2")
    assert refused(capsys, "run", "grpo", code=1) == ["realflow: rank 1 has died during train@2"]
    launched.error = KeyboardInterrupt()
    assert refused(capsys, "run", "grpo", code=1) == ["realflow: interrupted"]


def test_a_plan_takes_no_overrides(capsys: pytest.CaptureFixture[str], launched: Launched) -> None:
    ok(capsys, "plan", "grpo", "--devices", "1", "-o", "p.yaml")
    for options in (("steps=2",), ("--devices", "2"), ("--layout", "d1"), ("--cluster", "c.yaml")):
        assert "is resolved already" in refused(capsys, "run", "p.yaml", *options)[0]
    assert launched.calls == []


def test_under_a_bare_mpirun(
    capsys: pytest.CaptureFixture[str], launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(capsys, "plan", "grpo", "--devices", "1", "-o", "p.yaml")
    monkeypatch.setenv("PMIX_RANK", "0")
    assert "give --name or --run-dir" in refused(capsys, "run", "p.yaml")[0]
    monkeypatch.setenv("PMIX_NAMESPACE", "prterun-host-77@1")
    assert "is no plan file" in refused(capsys, "run", "grpo")[0]
    ok(capsys, "run", "p.yaml")
    ok(capsys, "run", "p.yaml", "--run-dir", "there")
    shared = Path("runs/p-prterun-host-77-1")
    assert launched.calls == [(Path("p.yaml"), shared), (Path("p.yaml"), Path("there"))]
    launched.code = 1
    with pytest.raises(SystemExit) as stopped:
        main(["run", "p.yaml"])
    assert stopped.value.code == 1


def test_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("realflow.observe.report")
    vars(fake)["write_report"] = lambda run_dir: run_dir / "report.html"
    monkeypatch.setitem(sys.modules, "realflow.observe.report", fake)
    Path("runs/x").mkdir(parents=True)
    assert ok(capsys, "report", "runs/x") == "runs/x/report.html\n"
    assert "no such folder" in refused(capsys, "report", "runs/y")[0]


REFUSALS: Mapping[str, tuple[str, str]] = {
    "unknown graph": ("check grpoo", "did you mean 'grpo'"),
    "missing file": ("check ./none.yaml", "none.yaml"),
    "unknown override": ("check grpo stps=3", "did you mean 'steps'"),
    "wrong value": ("check grpo steps=0", "expected a whole number >= 1"),
    "unknown ending": ("draw grpo -o grpo.pdf", "expected .svg, .mmd or .md"),
    "unwritable drawing": ("draw grpo -o none/grpo.svg", "cannot be written"),
    "missing model": ("plan grpo model=./none --devices 1", "models.actor.path"),
    "near model": ("plan grpo model=smollm2-135m", "did you mean smollm2-135m-instruct?"),
    "no devices": ("plan grpo --devices 0", "devices: found 0; expected from 1"),
    "no GPUs in a cluster": ("plan grpo --cluster zero.yaml", "found 0, expected a whole number from 1"),
    "a link that takes bytes back": ("plan grpo --cluster negative.yaml", "it must be more than 0"),
    "too large a model": (
        "plan grpo --cluster tiny.yaml --effort low",
        "no number of such devices and no 8 times their memory that was tried would do: take a smaller model",
    ),
    "too few prompts": (
        "plan grpo prompts=1 --devices 2 --fix rollout=d2",
        "rollout has 1 prompt a step, too few for 2 replicas: d1 is the most",
    ),
    "nothing fixed": ("plan grpo --fix rollout", "'rollout' fixes nothing; expected a call and its layout"),
    "fixed twice": ("plan grpo --fix rollout=d1 --fix rollout=d2", "rollout is fixed twice: d1 and d2"),
    "fixed and given": ("plan grpo --layout d2 --fix rollout=d1", "give layouts or fixed"),
    "a profile that is none": ("plan grpo --profile mine.yaml", "is not JSON"),
    "what if nothing": ("plan grpo --what-if gpus", "expected a name and its values, such as gpus=128,256"),
    "what if nonsense": ("plan grpo --what-if gppus=2", "the graph has no param gppus (gpus, model,"),
    "what if no devices": ("plan grpo --what-if gpus=0", "expected a number of devices of at least 1"),
    "what if written": ("plan grpo --what-if gpus=2 -o p.yaml", "it compares plans that are searched"),
    "what if endless": (
        "plan grpo --what-if gpus=1,2,3,4,5,6,7,8,9 steps=1,2,3,4,5,6,7,8",
        "found 72 combinations; expected at most 64",
    ),
    "layout of an unknown call": ("plan grpo --layout rolout=d1", "did you mean rollout?"),
    "layout too large": ("plan grpo --devices 2 --layout d3", "does not fit"),
    "tensor parallel": ("plan grpo --devices 2 --layout t2", "publishes no tensor plan (tp_plan)"),
    "what works instead": ("plan grpo --devices 2 --layout t2", "Of 2 ranks these work: d2t1p1"),
    "too many stages": (
        "plan grpo model=small-llama --devices 6 --layout p6",
        "p6 needs at least 6: use p1 to p4. Of 6 ranks these work: d1t2p3, d2t1p3, d1t3p2, d3t1p2, d1t6p1",
    ),
    "context parallel": ("plan grpo --devices 2 --layout c2", "reserved and cannot run yet"),
    "unknown flag": ("plan grpo --layout d1:recomptue", "did you mean recompute?"),
    "a flag of training": (
        "plan grpo --devices 1 --layout ref=d1:recompute",
        "--layout ref=d1:recompute: only",
    ),
    "no bubble": ("plan grpo --devices 1 --layout train=d1:zero_bubble", "d1t1p1 has none: use 1f1b"),
    "asynchronous": ("run async.yaml --layout d2", "(asynchronous) cannot run yet"),
    "missing cluster": ("plan grpo --cluster none.yaml", "none.yaml"),
    "both": ("plan grpo --devices 1 --cluster none.yaml", "not both"),
    "slots": ("plan grpo --slots 0", "slots: found 0"),
    "unwritable plan": ("plan grpo -o none/plan.yaml", "cannot be written"),
    "missing plan": ("explain none.yaml", "no such file"),
    "a graph is no plan": (
        "explain mine.yaml",
        "this is a graph file: realflow check, draw, plan and run take it",
    ),
    "a plan is no graph": ("check plan.yaml", "this is a plan file: realflow explain and run take it"),
    "a plan is no cluster": ("plan grpo --cluster plan.yaml", "this is a plan file"),
    "a cluster is no graph": (
        "check cluster.yaml",
        "this is a cluster file: realflow plan takes it as --cluster",
    ),
    "a shipped graph is no plan": ("explain grpo", "realflow plan grpo -o plan.yaml makes a plan of it"),
    "layout of no call": ("plan grpo --layout =d1", "'=d1' names no call before '='"),
    "no layout": ("plan grpo --layout rollout=", "'rollout=' gives no layout; expected such as rollout=d1"),
    "too many slots": ("plan grpo --slots 1000000000", "a step has 64 samples: expected at most that many"),
    "small budget": ("plan grpo --micro-batch-tokens 1", "micro_batch_tokens: found 1; expected at least 16"),
    "long responses": ("plan grpo max_new_tokens=64", "64 positions for prompt and response together"),
    "a folder that is nowhere": ("plan grpo model=./none", "beside the graph file or in"),
    "wrong kind of device": ("explain gpuu.yaml", "mi300x; did you mean 'cuda'?"),
    "unknown model to fetch": ("models fetch gpt", "expected one of"),
    "run without graph": ("run none", "neither a file nor a shipped graph"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(capsys: pytest.CaptureFixture[str], case: str, launched: Launched) -> None:
    grpo = Path(realflow.__file__).parent / "graphs" / "grpo.yaml"
    Path("mine.yaml").write_text(grpo.read_text())
    Path("async.yaml").write_text(grpo.read_text().replace("max_staleness: 0", "max_staleness: 1"))
    Path("cluster.yaml").write_text("nodes:\n  - {name: a, devices: 2}\n")
    Path("zero.yaml").write_text("nodes:\n  - {name: a, devices: 0, kind: h100}\n")
    Path("negative.yaml").write_text("nodes:\n  - {name: a, devices: 8, kind: h100, between: -1 GB/s}\n")
    Path("tiny.yaml").write_text("nodes:\n  - {name: a, devices: 2, memory: 5 MiB}\n")
    ok(capsys, "plan", "grpo", "--devices", "1", "--layout", "d1", "-o", "plan.yaml")
    Path("gpuu.yaml").write_text(re.sub(r"kind: \w+", "kind: gpuu", Path("plan.yaml").read_text()))
    command, message = REFUSALS[case]
    lines = refused(capsys, *shlex.split(command))
    assert message in "\n".join(lines)
    assert len(lines) == 1 or message not in ("this is a", "beside the graph file")  # one cause, one line
    assert launched.calls == []


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


@pytest.mark.parametrize(
    "argv", [[], ["chek"], ["check"], ["check", "grpo", "--foo"], ["graphs", "a=1"], ["models", "fetch"]]
)
def test_usage_errors_are_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: realflow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "plan grpo --devcies 2",
            "usage: realflow plan .*unrecognized arguments: --devcies 2; did you mean --dev",
        ),
        (
            "run grpo --layuot=d2",
            "usage: realflow run .*unrecognized arguments: --layuot=d2; did you mean --layout",
        ),
        ("graphs a=1", "usage: realflow graphs .*unrecognized arguments: a=1\n"),
    ],
)
def test_unknown_flags_show_what_the_command_takes(
    capsys: pytest.CaptureFixture[str], command: str, words: str
) -> None:
    with pytest.raises(SystemExit):
        main(command.split())
    assert re.search(words, capsys.readouterr().err, re.DOTALL)


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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    examples = capsys.readouterr().out.partition("example:\n")[2].strip().splitlines()
    assert examples
    for example in examples:
        words = shlex.split(example)
        argv = words[words.index("realflow") + 1 :]
        assert argv[0] == command
        args, rest = build_parser().parse_known_args(argv)
        assert all("=" in item for item in rest) and args.command


def test_the_examples_of_cheap_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    """check, draw, graphs, plan, explain and models do what their help shows."""
    for command in ("check", "draw", "graphs", "plan", "explain", "models"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        example = capsys.readouterr().out.partition("example:\n")[2].strip().splitlines()[0]
        ok(capsys, *shlex.split(example)[1:])


NO_TORCH = """
import sys
from realflow.cli import main
for line in {lines!r}:
    assert main(line.split()) == 0, line
loaded = sorted(name for name in ("torch", "transformers", "zmq", "mpi4py") if name in sys.modules)
assert not loaded, loaded
"""


def test_checking_and_planning_import_no_torch() -> None:
    lines = [
        "check grpo --explain batch",
        "draw grpo -o g.svg",
        "graphs",
        "plan grpo --devices 2 -o p.yaml",
        "explain p.yaml",
        "plan grpo model=small-llama --devices 4 --layout d2t2 --layout train=t2p2:recompute -o cut.yaml",
        "explain cut.yaml",
        "explain cut.yaml --realloc",
        "models",
    ]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH.format(lines=lines)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_importing_realflow_loads_almost_nothing() -> None:
    script = (
        "import realflow, sys; watched = {'yaml', 'torch', 'networkx', 'realflow', 'planner'}; "
        "print(sorted(name for name in sys.modules if name.split('.')[0] in watched))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "['realflow']"


def test_python_interface(launched: Launched) -> None:
    graph = realflow.Graph.load("grpo", ["steps=2"])
    assert (
        graph
        == realflow.load_graph("grpo", ["steps=2"])
        == load_graph(Path(realflow.__file__).parent / "graphs" / "grpo.yaml", ["steps=2"])
    )
    plan = realflow.plan(graph, devices=3, layouts={"rollout": "d2@0-1", "*": "d1@2"})
    assert plan.calls["rollout"].ranks == (0, 1) and plan.calls["train"].ranks == (2,)
    assert realflow.plan("grpo", devices=2, layouts="d2", overrides=["steps=2"]).graph == graph
    cut = realflow.plan(
        "grpo",
        devices=4,
        overrides=["model=small-llama"],
        layouts={"*": "d2t2", "train": "p2@2-3:recompute"},
    )
    assert (str(cut.calls["train"].layout), cut.calls["train"].recompute) == ("d1t1p2", True)
    assert [realloc.destination for realloc in cut.reallocs] == ["rollout"]
    result = realflow.run(plan, name="first", quiet=True)
    assert (result.run_dir, launched.calls) == (Path("runs/first"), [(plan, Path("runs/first"), True)])
    realflow.run("grpo", overrides=["steps=2"], devices=1)
    assert launched.calls[1][0].world_size == 1
    with pytest.raises(realflow.InputError, match="resolved already"):
        realflow.run(plan, devices=2)
    with pytest.raises(realflow.InputError, match="resolved already"):
        realflow.plan(graph, overrides=["steps=3"])
    with pytest.raises(AttributeError):
        realflow.nothing  # noqa: B018
    assert {"Graph", "plan", "run"} <= set(dir(realflow))
