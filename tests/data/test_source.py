"""Data sources: the same row anywhere, epochs, held-out texts, and errors that name the place."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.data.jsonl import CHECKED_BYTES, JsonlRows
from realflow.data.rows import open_rows
from realflow.data.source import open_source
from realflow.errors import InputError
from realflow.graph.datasection import REASONING_GYM_COLUMNS
from realflow.graph.types import DataSpec

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
FIELDS = {"prompt": "question", "answer": "answer"}


def chain_sum(**changes):
    base = {"task": "chain_sum", "options": SUMS, "size": 4000, "unique": "question", "test": 0.3}
    return DataSpec("reasoning_gym", FIELDS, **{**base, **changes})


def jsonl(path, rows, **changes):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return DataSpec("jsonl", changes.pop("fields", {"x": "x"}), path=str(path), **changes)


def texts(source, field="x"):
    return [source.row(g)[field] for g in range(len(source))]


def test_one_digit_sums_split_by_text():
    parts = {
        use: {seed: set(texts(open_source(chain_sum(use=use), seed=seed), "prompt")) for seed in (1, 2)}
        for use in ("train", "test")
    }
    assert [len(parts["train"][1]), len(parts["test"][1])] == [140, 60]
    assert not parts["train"][1] & parts["test"][1]
    assert len(parts["train"][1] | parts["test"][1]) == 200
    assert parts["test"][1] == parts["test"][2]  # held out under any seed


def test_any_worker_has_the_same_rows_in_any_order():
    one, other = open_source(chain_sum(), seed=3), open_source(chain_sum(), seed=3)
    backwards = {g: other.row(g) for g in reversed(range(300))}
    assert all(one.row(g) == backwards[g] for g in range(300))
    assert one.row(0).keys() == {"prompt", "answer"}


def test_epochs_hold_every_row_once_in_another_order(tmp_path):
    source = open_source(jsonl(tmp_path / "a.jsonl", [{"x": i} for i in range(50)]), seed=1)
    epochs = [[source.row(50 * epoch + g)["x"] for g in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = open_source(jsonl(tmp_path / "a.jsonl", [{"x": i} for i in range(50)]), seed=2)
    assert texts(other) != epochs[0]


def test_without_shuffle_rows_come_in_order(tmp_path):
    source = open_source(jsonl(tmp_path / "a.jsonl", [{"x": i} for i in range(5)], shuffle=False), seed=1)
    assert [source.row(g)["x"] for g in range(7)] == [0, 1, 2, 3, 4, 0, 1]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=3), min_size=1, max_size=40), st.floats(0, 0.9), st.integers(0, 2**40))
def test_split_is_exact_disjoint_and_free_of_duplicates(tmp_path_factory, values, test, seed):
    path = tmp_path_factory.mktemp("split") / "a.jsonl"
    distinct, parts = set(values), []
    held_out = round(test * len(distinct))
    for use, expected in (("train", len(distinct) - held_out), ("test", held_out)):
        spec = jsonl(path, [{"x": value} for value in values], unique="x", test=test, use=use)
        if expected:
            source = open_source(spec, seed=seed)
            found = texts(source)
            assert len(source) == len(set(found)) == expected
            parts.append(set(found))
        else:
            with pytest.raises(InputError, match="no rows are left"):
                open_source(spec, seed=seed)
    assert set.union(*parts) == distinct and sum(map(len, parts)) == len(distinct)


def test_reasoning_gym_entry_serves_its_own_scorer():
    import reasoning_gym

    spec = DataSpec("reasoning_gym", {"prompt": "question", "entry": "entry"}, task="gcd", size=20)
    row = open_source(spec, seed=1).row(4)
    scorer = reasoning_gym.get_score_answer_fn("gcd")
    assert scorer(answer=row["entry"]["answer"], entry=row["entry"]) == 1.0


def test_columns_of_reasoning_gym_are_those_that_checking_knows():
    row = open_rows(chain_sum(), 1, None)[0]
    assert set(row) == set(REASONING_GYM_COLUMNS)


def test_jsonl_lines_of_all_kinds(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"x": "é"}\r\n\n   \n{"x": [1, {"y": null}]}\n{"x": "\\u2028 \u2028"}'.encode())
    rows = JsonlRows(path)
    assert [rows[i]["x"] for i in (2, 0, 1)] == ["\u2028 \u2028", "é", [1, {"y": None}]]
    assert [rows.place(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 4, 5)]


def test_jsonl_is_not_held(tmp_path):
    """Opening a file of 30 MB costs far less than its size in memory of the interpreter."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"x": "{"y" * 3000}"}}\n' for _ in range(10_000)))
    code = (
        "import sys, tracemalloc; from pathlib import Path; from realflow.data.jsonl import JsonlRows\n"
        "tracemalloc.start(); rows = JsonlRows(Path(sys.argv[1])); len(rows[9999]['x'])\n"
        "print(tracemalloc.get_traced_memory()[1], 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    peak, torch = out.stdout.split()
    assert int(peak) < 1_000_000 and torch == "False"


def test_broken_lines_are_reported_together_with_their_lines(tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", ['{"x": 1}', '{"x": ', "", "[1]", '{"x": 2}', "[" * 200_000])
    with pytest.raises(InputError) as caught:
        open_source(spec, seed=1)
    assert [problem.line for problem in caught.value.problems] == [2, 4, 6]
    assert "a.jsonl:2: not JSON" in str(caught.value) and "found list" in str(caught.value)


def test_a_broken_line_far_behind_is_reported_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr("realflow.data.jsonl.CHECKED_BYTES", 10)
    assert CHECKED_BYTES > 1_000_000
    jsonl(tmp_path / "a.jsonl", [{"x": 1000}, "oops"])
    rows = JsonlRows(tmp_path / "a.jsonl")
    assert rows[0] == {"x": 1000}
    with pytest.raises(InputError, match=r"a\.jsonl:2: not JSON"):
        rows[1]


def test_latin_1_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"x": 1}\n{"x": "\xe9"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: not UTF-8 \(byte 8"):
        open_source(DataSpec("jsonl", {"x": "x"}, path=str(path)), seed=1)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("", {}, "the file is empty"),
        ("\n \n", {}, "only blank lines"),
        ('{"text": 1}', {}, "a.jsonl:1: no column 'x'"),
        ('{"questions": 1}', {"fields": {"prompt": "question"}}, "did you mean 'questions'"),
        ('{"x": 1}', {"unique": "question"}, "no column 'question'"),
        ('{"x": 1}', {"test": 0.5}, "needs `unique`"),
        ('{"x": 1}', {"path": "other.jsonl"}, "no such file"),
        ('{"x": 1}', {"path": None}, "needs a path"),
        ('{"x": 1}', {"source": "json"}, "did you mean 'jsonl'"),
    ],
)
def test_errors_of_files(tmp_path, content, changes, message):
    (tmp_path / "a.jsonl").write_text(content)
    base = {"source": "jsonl", "fields": {"x": "x"}, "path": "a.jsonl"}
    with pytest.raises(InputError, match=message):
        open_source(DataSpec(**{**base, **changes}), seed=1, base=tmp_path)


def test_a_row_that_lacks_a_column_is_named(tmp_path):
    source = open_source(jsonl(tmp_path / "a.jsonl", [{"x": 1}, {"y": 1}], shuffle=False), seed=1)
    with pytest.raises(InputError, match=r"a\.jsonl:2: no column 'x'"):
        source.row(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chain_sums"}, "did you mean 'chain_sum'"),
        ({"task": None}, "unknown reasoning-gym task"),
        ({"options": {"min_term": 2}}, "did you mean 'min_terms'"),
        ({"options": {"min_terms": 5, "max_terms": 2}}, "refuses these options"),
        ({"options": {"min_terms": "two"}}, "refuses these options"),
        ({"unique": "prompt"}, "no column 'prompt'"),
    ],
)
def test_errors_of_reasoning_gym(changes, message):
    with pytest.raises(InputError, match=message):
        open_source(chain_sum(**changes), seed=1)


def test_rows_from_a_function(tmp_path):
    (tmp_path / "my_rows_e.py").write_text(
        "def endless(start, seed):\n    i = start\n    while True:\n"
        "        yield {'x': i, 'seed': seed}\n        i += 1\n"
        "def held():\n    return [{'x': 1}, {'x': 2}]\n"
        "def broken():\n    yield {'x': 1}\n    raise KeyError('lost')\n"
        "def wrong():\n    return [1]\n"
        "def none():\n    return []\n"
        "def nothing():\n    pass\n"
        "def read(path):\n    yield {'x': open(path).read()}\n"
    )

    def source(name, **changes):
        spec = DataSpec(f"my_rows_e:{name}", **{"fields": {"x": "x"}, "shuffle": False, **changes})
        return open_source(spec, seed=7, base=tmp_path)

    endless = source("endless", options={"start": 3}, size=4, fields={"x": "x", "s": "seed"})
    assert [endless.row(g) for g in (0, 3)] == [{"x": 3, "s": 7}, {"x": 6, "s": 7}]
    assert texts(source("held")) == [1, 2] and texts(source("held", size=1)) == [1]
    (tmp_path / "words.txt").write_text("hello")
    assert texts(source("read", path="words.txt")) == ["hello"]
    for name, message in [
        ("broken", "raised KeyError: 'lost'"),
        ("wrong", "wrong, row 0: found int"),
        ("none", "there are no rows"),
        ("nothing", "returned NoneType"),
        ("absent", "has no 'absent'"),
    ]:
        with pytest.raises(InputError, match=message):
            source(name)
    with pytest.raises(InputError, match="raised TypeError"):
        source("endless")


def test_parquet_needs_pyarrow_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        open_source(DataSpec("parquet", {"x": "x"}, path="a.parquet"), seed=1, base=tmp_path)


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"x": i, "messages": [{"role": "user", "content": str(i)}]} for i in range(20)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)

    def source(**fields):
        spec = DataSpec("parquet", fields, path="a.parquet", size=15, shuffle=False)
        return open_source(spec, seed=1, base=tmp_path)

    found = source(x="x", prompt="messages")
    assert len(found) == 15 and found.row(9) == {"x": 9, "prompt": [{"role": "user", "content": "9"}]}
    with pytest.raises(InputError, match="no column 'y'"):
        source(x="y")
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(InputError, match="not a parquet file"):
        source(x="x")
