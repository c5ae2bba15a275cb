"""Problems of every shape: found columns, ids, sources, the text around them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from shapes import AIME, HUMANEVAL, MATH, MIXED, write

from realflow.errors import InputError
from realflow.evaluation.formats import CODE_PROMPT, MATH_PROMPT, Wishes, columns_of, open_format
from realflow.evaluation.problems import SOURCE, from_plain, read_problems, rows, sets_of
from realflow.evaluation.samples import NUMBERS
from realflow.graph import find_graph, load_graph
from realflow.graph.functions import load_function


def opened(path: Path | str, **wishes: object) -> tuple[list[dict], str]:
    """The rows of a file or task, and its reward."""
    asked = open_format(str(path), Wishes(**wishes))  # type: ignore[arg-type]
    return [dict(row) for row in read_problems([asked.problems]).rows], asked.reward


def test_aime(tmp_path: Path) -> None:
    found, reward = opened(write(tmp_path / "aime.jsonl", AIME))
    assert reward == "rewards.math" and len(found) == 5
    assert found[2]["prompt"] == MATH_PROMPT.replace("{problem}", AIME[2]["problem"])
    assert found[2]["prompt"].endswith(r"within \boxed{}.")
    assert (found[2]["answer"], found[2]["problem_id"]) == ("4", "aime/62")
    assert (found[2]["source"], found[2]["draw_id"]) == ("aime", 2 * NUMBERS)


def test_math_has_its_answers_in_solutions_and_sources_where_they_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "math.jsonl", MATH)
    found, _ = opened(path)
    assert [row["answer"] for row in found] == [row["solution"] for row in MATH]
    assert found[1]["problem_id"] == "math/1"
    by_type, _ = opened(path, columns={"source": "type"})
    assert [row["source"] for row in by_type] == ["Algebra", "Algebra", "Counting"]


def test_a_column_source_and_numbers_for_answers(tmp_path: Path) -> None:
    found, _ = opened(write(tmp_path / "mixed.jsonl", MIXED), prompt="Q: {problem}")
    assert [row["source"] for row in found] == ["even", "odd"] * 3
    assert found[3]["prompt"] == "Q: What is 3 + 1?" and found[3]["answer"] == 4


def test_humaneval(tmp_path: Path) -> None:
    found, reward = opened(write(tmp_path / "he.jsonl", HUMANEVAL))
    assert reward == "rewards.humaneval"
    assert found[0]["prompt"] == CODE_PROMPT.replace("{problem}", HUMANEVAL[0]["prompt"])
    assert "{a}" in found[0]["prompt"]  # nothing but {problem} is replaced
    assert found[0]["problem"] == HUMANEVAL[0]["prompt"]
    assert (found[1]["entry_point"], found[1]["problem_id"]) == ("add_1", "he/HumanEval/1")
    assert found[1]["test"] == HUMANEVAL[1]["test"] and "canonical_solution" not in found[1]


def test_a_task_of_reasoning_gym() -> None:
    found, reward = opened("chain_sum", limit=4)
    assert reward == "rewards.gym" and [row["problem_id"] for row in found] == [
        f"chain_sum/{i}" for i in range(4)
    ]
    assert found[0]["entry"]["answer"] == found[0]["answer"]
    more, _ = opened("chain_sum")
    assert len(more) == 100 and more[:4] == found  # fewer are the first of more


def test_a_parquet_file(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(AIME), tmp_path / "aime.parquet")
    found, _ = opened(tmp_path / "aime.parquet")
    write(tmp_path / "aime.jsonl", AIME)
    assert found == opened(tmp_path / "aime.jsonl")[0]


def test_every_column_is_a_field_where_a_reward_of_the_users_may_ask_for_it(tmp_path: Path) -> None:
    path = write(tmp_path / "math.jsonl", [{**row, "not a name": 1} for row in MATH])
    assert {"level", "type", "solution"} <= set(opened(path, whole=True)[0][0])
    assert "not a name" not in opened(path, whole=True)[0][0]


def test_the_source_of_a_graph_gives_the_same_in_part(tmp_path: Path) -> None:
    first = open_format(str(write(tmp_path / "aime.jsonl", AIME)), Wishes(limit=3)).problems
    second = open_format(str(write(tmp_path / "he.jsonl", HUMANEVAL)), Wishes()).problems
    plain = json.loads(json.dumps([first.to_plain(), second.to_plain()]))  # as a plan keeps it
    assert [from_plain(value) for value in plain] == [first, second]
    function = load_function(SOURCE)
    everything = function(plain)
    assert function is rows and len(everything) == 6
    assert len({frozenset(row) for row in everything}) == 1  # a field that a set has not is None
    assert everything[0]["entry_point"] is None and everything[5]["answer"] is None
    assert function(plain, only=[5, 0, 2]) == [everything[place] for place in (5, 0, 2)]


def test_the_problems_of_a_graph_are_its_own(tmp_path: Path) -> None:
    graph = load_graph(find_graph("evaluate"))
    problems = read_problems(sets_of(graph.data))
    assert len(problems.rows) == 60 and problems.ids[0] == "chain_sum/0"
    trained = load_graph(find_graph("grpo")).data
    taught = read_problems(sets_of(trained))
    asked = {row["prompt"] for row in problems.rows}
    assert len(asked) == 60 and not asked & {row["prompt"] for row in taught.rows}
    assert read_problems(sets_of(graph.data)).digest == problems.digest != taught.digest
    few = read_problems(sets_of(graph.data, limit=7))
    assert few.ids == problems.ids[:7]


def test_ids_must_differ(tmp_path: Path) -> None:
    path = write(tmp_path / "aime.jsonl", [*AIME, AIME[1]])
    with pytest.raises(InputError, match="places 1 and 5 are both called 'aime/61'"):
        opened(path)
    assert len(opened(path, columns={"id": "problem"}, limit=5)[0]) == 5
    twice = [dataclasses.replace(open_format(str(path), Wishes(limit=2)).problems, name=n) for n in "ab"]
    assert len(read_problems(twice).rows) == 4  # of other names, the same ids are no trouble


ROW = '{"problem": "1", "answer": "1"}\n'
GOLD = '{"problem": "1", "gold": "1"}\n'
BROKEN = {
    "no such file": ("missing.jsonl", None, {}, "cannot be read: No such file"),
    "neither file nor task": ("chain_sun", None, {}, "did you mean 'chain_sum'"),
    "another ending": ("data.csv", "a,b", {}, "neither a .jsonl or .parquet file"),
    "empty": ("e.jsonl", "\n\n", {}, "the file is empty"),
    "a list": ("l.jsonl", "[1]\n", {}, "found list in the first row"),
    "not json": ("n.jsonl", "{problem: 1}\n", {}, "the first row is not JSON"),
    "a broken second row": ("b.jsonl", ROW + '{"pro\n', {}, "b.jsonl:2: not JSON"),
    "a row without the column": (
        "c.jsonl", ROW + '{"problem": "2"}\n', {}, "no column 'answer'",
    ),
    "no answer": ("a.jsonl", GOLD, {}, "no column for the answer; it has problem"),
    "nothing": ("x.jsonl", '{"text": "1"}\n', {}, "no column for the problem and the answer"),
    "a column that is not there": (
        "a.jsonl", GOLD, {"columns": {"answer": "golden"}}, "did you mean 'gold'",
    ),
    "an unknown role": (
        "a.jsonl", ROW, {"columns": {"anser": "answer"}}, "did you mean 'answer'",
    ),
    "a prompt without a place": (
        "a.jsonl", ROW, {"prompt": "Solve it."}, "with {problem} in it",
    ),
    "columns of a task": ("chain_sum", None, {"columns": {"answer": "answer"}}, "no columns to choose"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, text, wishes, message = BROKEN[case]
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(InputError) as caught:
        opened(name, **wishes)
    assert message in str(caught.value)


def test_a_mark_at_the_start_of_a_file_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(AIME[0]).encode() + b"\n")
    assert columns_of(path) == ["id", "problem", "answer"]
