"""Problems of every shape under the reward that is meant for them: right answers alone are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from shapes import AIME, HUMANEVAL, MATH, write

from realflow.engines.functions import load_callable, run_function
from realflow.evaluation.formats import Wishes, open_format
from realflow.evaluation.graphs import ask, drawing
from realflow.evaluation.problems import read_problems
from realflow.graph import find_graph, load_graph


def judged(data: str, right: Sequence[str], wrong: str) -> list[Any]:
    """Rewards of the right completion of each problem, and of a wrong one for each."""
    opened = open_format(data, Wishes(limit=len(right)))
    asked = ask(load_graph(find_graph("evaluate")), sets=[opened.problems], reward=opened.reward)
    rows = read_problems(asked.sets).rows
    graph = drawing(asked, list(rows[0]), range(len(rows)), len(rows), greedy=True)
    call = graph.call("reward")
    assert call.decl.name == opened.reward and call.timeout == 1800
    twice = [*rows, *rows]
    columns = {name: [row[name] for row in twice] for name in rows[0]}
    columns["completion"] = [*right, *[wrong] * len(rows)]
    given = {field: columns[field] for field in call.reads.values()}
    ids, lengths = range(len(twice)), [1] * len(twice)
    function = load_callable(call.decl.name)
    return run_function(function, call, ids, given, lengths, graph.extents, graph.dtypes)["rewards"]


def test_mathematics(tmp_path: Path) -> None:
    aime = str(write(tmp_path / "aime.jsonl", AIME))
    right = [f"Therefore the remainder is $\\boxed{{{row['answer']}}}$." for row in AIME]
    assert judged(aime, right, r"It is $\boxed{8}$.") == [1.0] * 5 + [0.0] * 5
    math = str(write(tmp_path / "math.jsonl", MATH))
    right = [r"\boxed{2}", r"It is $\boxed{0.5}$", "The answer is 3."]
    assert judged(math, right, r"\boxed{-7}") == [1.0] * 3 + [0.0] * 3


def test_a_task_of_reasoning_gym(tmp_path: Path) -> None:
    opened = open_format("chain_sum", Wishes(limit=3))
    answers = [row["answer"] for row in read_problems([opened.problems]).rows]
    right = [f"I add. <answer>{answer}</answer>" for answer in answers]
    found = judged("chain_sum", right, "<answer>x</answer>")
    assert found[:3] == [1.0] * 3 and all(reward < 1 for reward in found[3:])


def test_humaneval(tmp_path: Path) -> None:
    from realflow.rewards.sandbox import Sandbox

    if Sandbox.check().walls is None:
        pytest.skip("this machine cannot contain programs")
    path = str(write(tmp_path / "he.jsonl", HUMANEVAL))
    right = [
        "```python\n" + row["prompt"] + "    return a + b\n```" if i else "    return a + b\n"
        for i, row in enumerate(HUMANEVAL)
    ]
    assert judged(path, right, "    return a - b\n") == [1.0] * 3 + [0.0] * 3
