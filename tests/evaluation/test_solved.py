"""Prompts that are sometimes solved, from the folder of an evaluation."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from answers import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.data.source import open_source
from realflow.errors import InputError
from realflow.evaluation.samples import to_line
from realflow.evaluation.solved import rows
from realflow.graph.types import DataSpec

rewards = st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), min_size=1, max_size=6)


def folder(path: Path, given: list[list[float | None]]) -> Path:
    """An evaluation as `realflow evaluate` leaves it, whose greedy answers are all right."""
    path.mkdir(exist_ok=True)
    lines = [sample for place, values in enumerate(given) for sample in drawn(place, values, greedy=1.0)]
    problems = [
        {"problem_id": f"sums/{i}", "source": "sums", "prompt": f"{i} + 1?", "answer": str(i + 1)}
        for i in range(len(given))
    ]
    write(path / "samples.jsonl", [to_line(sample) for sample in lines])
    write(path / "problems.jsonl", problems)
    return path


def write(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@settings(deadline=None, max_examples=50)
@given(st.lists(rewards, min_size=1, max_size=8), st.integers(0, 3), st.integers(4, 6))
def test_those_between_the_bounds_by_counting(
    tmp_path_factory: pytest.TempPathFactory, given: list[list[float | None]], low: int, high: int
) -> None:
    path = folder(tmp_path_factory.mktemp("solved"), given)
    above, below = Fraction(low, 6), Fraction(high, 6)
    wanted = {}
    for place, values in enumerate(given):
        known = [value for value in values if value is not None]
        if known and above < (share := Fraction(known.count(1.0), len(known))) < below:
            wanted[f"sums/{place}"] = float(share)
    try:
        found = rows(str(path), above=float(above), below=float(below))
    except InputError as error:
        assert not wanted and "none of" in str(error)
    else:
        assert {row["problem_id"]: row["solve_rate"] for row in found} == wanted
        assert all(row["answer"] == str(int(row["problem_id"][5:]) + 1) for row in found)


def test_as_the_data_of_a_graph(tmp_path: Path) -> None:
    folder(tmp_path / "eval", [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [None, None], [0.0, 1.0, 1.0]])
    spec = DataSpec(
        "realflow.evaluation.solved:rows",
        {"prompt": "prompt", "answer": "answer"},
        path="eval",
        shuffle=False,
    )
    source = open_source(spec, seed=0, base=tmp_path)
    assert [source.row(g) for g in range(len(source))] == [
        {"prompt": "1 + 1?", "answer": "2"},
        {"prompt": "4 + 1?", "answer": "5"},
    ]


def test_what_is_right_is_a_matter_of_the_reward(tmp_path: Path) -> None:
    path = folder(tmp_path / "eval", [[0.5, 0.0], [1.0, 0.5]])
    assert [row["solve_rate"] for row in rows(str(path), solved=0.5)] == [0.5]
    assert [row["problem_id"] for row in rows(str(path))] == ["sums/1"]


def test_what_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "eval", [[1.0, 1.0], [0.0, 0.0]])
    with pytest.raises(InputError, match="none of 2 problems is solved in a share"):
        rows(str(path))
    with pytest.raises(InputError, match="expected 0 <= above < below <= 1"):
        rows(str(path), above=0.5, below=0.5)
    with pytest.raises(InputError, match="expected the folder of an evaluation"):
        rows(str(tmp_path))
    lines = (path / "samples.jsonl").read_text().splitlines(keepends=True)
    (path / "samples.jsonl").write_text("".join(lines[:3]))  # of the first problem alone
    with pytest.raises(InputError, match="1 of 2 problems have no drawn answer, such as sums/1; finish"):
        rows(str(path))
    (path / "problems.jsonl").unlink()
    with pytest.raises(InputError, match=r"no problems\.jsonl"):
        rows(str(path))
