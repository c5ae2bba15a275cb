"""One mistake, one cause: what only follows from a slip is not reported beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from realflow.cli import main
from realflow.errors import InputError
from realflow.graph import find_graph, graph_to_mapping, load_graph

GRPO = find_graph("grpo").read_text()

SLIPS = {
    "op: generate": ("op: genrate", ["calls.rollout.op"]),
    "op: train": ("op: trian", ["calls.train.op"]),
    "op: infer": ("op: inferr", ["calls.ref.op"]),
    "use: losses.ppo_clip": ("use: losses.ppo", ["calls.train.use"]),
    "\ncalls:": ("\ncall:", ["", "call"]),
    "\nmodels:": ("\nmodel:", ["", "model"]),
    "\ndata:": ("\ndate:", ["", "date"]),
}


@pytest.mark.parametrize("good", SLIPS)
def test_a_slip_is_reported_alone(good: str) -> None:
    wrong, places = SLIPS[good]
    assert GRPO.count(good) == 1
    with pytest.raises(InputError) as caught:
        load_graph(GRPO.replace(good, wrong))
    assert [problem.where for problem in caught.value.problems] == places


def test_two_slips_are_both_reported() -> None:
    """The control: nothing that is wrong by itself is lost."""
    with pytest.raises(InputError) as caught:
        load_graph(
            GRPO.replace("op: infer", "op: inferr").replace("use: rewards.last_number", "use: rewards.no")
        )
    assert [problem.where for problem in caught.value.problems] == ["calls.reward.use", "calls.ref.op"]


def test_checkpoints_kept() -> None:
    graph = load_graph(GRPO.replace("keep: 3", "keep: 7"))
    assert graph.checkpoint_keep == 7
    assert load_graph(graph_to_mapping(graph)) == graph
    assert load_graph(GRPO.replace(", keep: 3", "")).checkpoint_keep == 3


def test_parameters_are_named_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text("def weird(y, x, b, a): ...\n")
    (tmp_path / "g.yaml").write_text(GRPO.replace("use: rewards.last_number", "use: odd:weird"))
    with pytest.raises(InputError, match=r"weird\(y, x, b, a\)"):
        load_graph(tmp_path / "g.yaml")


def test_a_call_is_not_advised_to_read_what_it_writes() -> None:
    with pytest.raises(InputError) as caught:
        load_graph(
            GRPO.replace("use: rewards.last_number", "use: rewards.last_number\n    reads: {answer: zzz}")
        )
    (problem,) = (p for p in caught.value.problems if p.where.startswith("calls.reward"))
    assert "known: " in problem.message and "completion" in problem.message
    assert "rewards" not in problem.message and "advantages" in problem.message


BUILTIN = {"credit": "credit.gae", "kl": "running.adaptive_kl", "scale": "running.normalise_returns"}
OUT_OF_RANGE = [
    ("lam=2", "calls.credit.options.lam", "found 2, expected a number from 0 to 1"),
    ("gamma=-1", "calls.credit.options.gamma", "found -1, expected a number from 0 to 1"),
    ("kl_coef=-0.5", "calls.kl.options.kl_coef", "found -0.5, expected a number >= 0"),
    ("kl_target=-1", "calls.kl.options.target", "found -1, expected a number >= 0"),
    ("value_memory=1.5", "calls.scale.options.beta", "found 1.5, expected a number from 0 to 1"),
]


@pytest.mark.parametrize(("override", "where", "message"), OUT_OF_RANGE)
def test_options_out_of_range_are_refused_with_file_and_line(
    override: str, where: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = find_graph("ppo")
    with pytest.raises(InputError) as caught:
        load_graph(file, [override])
    (problem,) = caught.value.problems
    assert (problem.file, problem.where) == (str(file), where) and message in problem.message
    use = BUILTIN[where.split(".")[1]]
    assert problem.line == file.read_text().split(f"use: {use}")[0].count("\n") + 2
    assert main(["check", "ppo", override]) == 2
    assert f"{file}:{problem.line}: {where}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("clip: -0.2", "found -0.2, expected a number above 0"),
        ("clip: 0", "found 0, expected a number above 0"),
        ("clip: null", "found nothing, expected a number above 0"),
        ("clip: high", "found the text 'high', expected a number above 0"),
    ],
)
def test_a_range_takes_numbers_in_it_alone(options: str, message: str) -> None:
    text = find_graph("ppo").read_text().replace('{clip: "${value_clip}"}', f"{{{options}}}")
    with pytest.raises(InputError) as caught:
        load_graph(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "found"), [("null", None), ("3", 3.0), ("1", InputError), ("yes", InputError)]
)
def test_an_option_that_is_off_by_default_can_be_null(value: str, found: object) -> None:
    text = GRPO.replace(
        "use: losses.ppo_clip", f"use: losses.ppo_clip\n    options: {{dual_clip: {value}}}", 1
    )
    text = "\n".join(line for line in text.splitlines() if "clip_low" not in line)
    if found is InputError:
        with pytest.raises(InputError, match="expected a number above 1 or null"):
            load_graph(text)
    else:
        assert load_graph(text).call("train").options["dual_clip"] == found
