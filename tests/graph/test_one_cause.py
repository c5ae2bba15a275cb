"""One mistake, one cause: what only follows from a slip is not reported beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

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
