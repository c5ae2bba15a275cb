"""The commands: what they print, what they write, and how they refuse.

Nothing here starts a run: the launcher and the worker are replaced (`launched`).
"""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
from calling import Launched, ok, refused

import realflow
from realflow.cli import build_parser, main
from realflow.errors import RunError
from realflow.planfile import read_plan

COMMANDS = ("check", "draw", "graphs", "plan", "explain", "run", "evaluate", "report", "models", "profile")
pytestmark = pytest.mark.usefixtures("model_cache", "launched")


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
