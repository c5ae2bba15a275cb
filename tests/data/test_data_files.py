"""Files of rows: jsonl, parquet and saved datasets read as other readers read them, in constant memory."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.data import arrow, jsonl
from realflow.data.arrow import ParquetRows
from realflow.data.jsonl import JsonlRows
from realflow.data.rows import open_rows
from realflow.data.source import open_source
from realflow.errors import InputError
from realflow.graph.types import DataSpec

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
blank = st.sampled_from(["", " ", "\t \r", "   \t"])
lines = st.lists(
    st.tuples(values.map(lambda value: json.dumps({"x": value})), st.sampled_from(["", " ", "\r"])).map(
        "".join
    )
    | blank,
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(
    lines=lines,
    end=st.sampled_from(["", "\n", "\n \n", "\n  "]),
    mark=st.sampled_from(["", "\ufeff"]),
    chunk=st.sampled_from([1, 7, 64, 1 << 18]),
    marks=st.sampled_from([1, 3, 1 << 20]),
    size=st.none() | st.integers(1, 80),
)
def test_jsonl_has_the_lines_that_are_not_blank(tmp_path_factory, lines, end, mark, chunk, marks, size):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes((mark + "\n".join(lines) + end).encode())
    wanted = [(number + 1, json.loads(line)) for number, line in enumerate(lines) if line.strip()][:size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_CHUNK", chunk)
        patch.setattr(jsonl, "MARKS", marks)
        if not wanted:
            with pytest.raises(InputError, match=r"blank lines|is empty"):
                JsonlRows(path)
            return
        rows = JsonlRows(path, size)
        assert rows._stride > 1 or len(wanted) <= marks
        order = random.Random(len(lines)).sample(range(len(wanted)), len(wanted))
        assert len(rows) == len(wanted)
        assert [rows[i] for i in order] == [wanted[i][1] for i in order]
        assert [rows.place(i) for i in order] == [f"{path}:{wanted[i][0]}" for i in order]
        with pytest.raises(IndexError):
            rows[len(wanted)]


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n{"x": 2}\n')
    rows = JsonlRows(path)
    path.write_text('{"x": 1}\n')
    assert rows[0] == {"x": 1}
    with pytest.raises(InputError, match="became shorter"):
        rows[1]


table_rows = st.lists(
    st.fixed_dictionaries(
        {
            "x": st.integers(-(2**60), 2**60) | st.none(),
            "text": st.text(max_size=20) | st.none(),
            "messages": st.lists(
                st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": st.text()}),
                max_size=3,
            ),
            "extra": st.fixed_dictionaries(
                {"answer": st.integers(0, 9), "tags": st.lists(st.text(max_size=2))}
            ),
            "kind": st.sampled_from(["a", "b"]),
        }
    ),
    min_size=1,
    max_size=40,
)


def table_of(rows):
    table = pa.Table.from_pylist(rows)
    place = table.schema.names.index("kind")
    return table.set_column(place, "kind", table["kind"].dictionary_encode())  # as pandas writes categories


@settings(deadline=None, max_examples=40)
@given(
    rows=table_rows,
    group=st.integers(1, 50),
    batch=st.integers(1, 9),
    held=st.sampled_from([0, 600, 1 << 20]),
    size=st.none() | st.integers(1, 60),
)
def test_parquet_has_what_pyarrow_reads(tmp_path_factory, rows, group, batch, held, size):
    path = tmp_path_factory.mktemp("table") / "a.parquet"
    pq.write_table(table_of(rows), path, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow, "BATCH_ROWS", batch)
        patch.setattr(arrow, "HELD_BYTES", held)
        found = ParquetRows(path, size, ["text", "extra.answer", "messages", "x", "kind"])
        wanted = pq.read_table(path).to_pylist()[:size]
        assert len(found) == len(wanted)
        for i in random.Random(group).sample(range(len(wanted)), len(wanted)):
            assert found[i] == wanted[i]
        spilled = found._store._file is not None
        assert spilled or held
        assert not (spilled and held == 1 << 20)


def test_only_the_needed_columns_are_read(tmp_path):
    pq.write_table(pa.table({"x": [1, 2], "big": ["b" * 1000] * 2, "a.b": [3, 4]}), tmp_path / "a.parquet")
    assert ParquetRows(tmp_path / "a.parquet", None, ["x"])[1] == {"x": 2}
    assert ParquetRows(tmp_path / "a.parquet", None, ["a.b"])[1] == {"a.b": 4}, "a name with a dot"
    with pytest.raises(InputError, match="no column 'bg'; did you mean 'big'"):
        ParquetRows(tmp_path / "a.parquet", None, ["x", "bg"])


def test_categories_inside_lists_are_refused(tmp_path):
    kind = pa.list_(pa.dictionary(pa.int8(), pa.string()))
    pq.write_table(pa.table({"x": pa.array([["a"], ["b", "a"]], kind)}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"'x' has categories .* inside lists"):
        ParquetRows(tmp_path / "a.parquet", None, ["x"])


def test_parquet_that_ends_in_the_middle(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": list(range(5000))}), path, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    rows = ParquetRows(path, None, ["x"])
    with pytest.raises(InputError, match="row group 0 cannot be read"):
        rows[0]


def test_several_files_share_what_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MARKS", 30)
    monkeypatch.setattr(jsonl, "CHECKED_BYTES", 300)
    monkeypatch.setattr(arrow, "HELD_BYTES", 3000)
    for part in range(3):
        (tmp_path / f"{part}.jsonl").write_text('{"x": 1}\n' * 80)
        pq.write_table(pa.table({"x": list(range(500))}), tmp_path / f"{part}.parquet", row_group_size=100)
    lines = open_rows(DataSpec("jsonl", {"x": "x"}, path="*.jsonl"), 1, tmp_path)
    assert [(len(part._marks), part._stride, part._checked) for part in lines._parts] == [(10, 8, 100)] * 3
    table = open_rows(DataSpec("parquet", {"x": "x"}, path="*.parquet"), 1, tmp_path)
    assert [table[i]["x"] for i in range(1500)] == [*range(500)] * 3
    assert all(0 < part._store._bytes <= 1000 and part._store._file for part in table._parts)


def test_several_files_by_a_pattern(tmp_path):
    for name, start in (("b-1", 3), ("b-0", 0), ("c", 100)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"x": {start + i}}}\n' for i in range(3)))
        pq.write_table(pa.table({"x": [start, start + 1, start + 2]}), tmp_path / f"{name}.parquet")

    def rows(source, path, size=None):
        found = open_rows(DataSpec(source, {"x": "x"}, path=path, size=size), 1, tmp_path)
        return [found[i]["x"] for i in range(len(found))], found

    for source in ("jsonl", "parquet"):
        assert rows(source, f"b-*.{source}")[0] == [0, 1, 2, 3, 4, 5]
        assert rows(source, f"b-?.{source}", 4)[0] == [0, 1, 2, 3]
        assert rows(source, f"[c]*.{source}")[0] == [100, 101, 102]
        with pytest.raises(InputError, match="no such file"):
            rows(source, f"d*.{source}")
    assert rows("jsonl", "b-*.jsonl")[1].place(4) == f"{tmp_path}/b-1.jsonl:2"
    assert rows("parquet", "b-*.parquet")[1].place(4) == f"{tmp_path}/b-1.parquet, row 1"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Dataset with its rows selected in another order, and a DatasetDict, as `datasets` saves them."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("saved")
        patch.setenv("HF_HOME", str(folder / "home"))
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        rows = [
            {
                "question": f"{i}?",
                "n": i,
                "extra": {"answer": [i, i + 1]},
                "messages": [{"role": "user"}] * (i % 3),
            }
            for i in range(2500)
        ]
        one = datasets.Dataset.from_list(rows).shuffle(seed=1).select(range(2300))
        one.save_to_disk(folder / "one", num_shards=3)
        both = datasets.DatasetDict({"train": one.select(range(20)), "test": one.select(range(20, 25))})
        both.save_to_disk(folder / "both")
        return folder, list(one)


def hf(path, split=None, size=None, **fields):
    return DataSpec(
        "hf", fields or {"q": "question"}, path=str(path), split_name=split, size=size, shuffle=False
    )


def test_saved_datasets_have_what_datasets_reads(saved):
    folder, wanted = saved
    columns = {"q": "question", "n": "n", "second": "extra.answer.1", "messages": "messages"}
    source = open_source(hf(folder / "one", **columns), seed=1)
    assert len(source) == len(wanted) == 2300
    for i in random.Random(1).sample(range(2300), 400):
        row = wanted[i]
        second = row["extra"]["answer"][1]
        assert source.row(i) == {
            "q": row["question"],
            "n": row["n"],
            "second": second,
            "messages": row["messages"],
        }
    assert len(open_source(hf(folder / "one", size=1000), seed=1)) == 1000
    test = open_source(hf(folder / "both", "test"), seed=1)
    assert [test.row(i)["q"] for i in range(len(test))] == [row["question"] for row in wanted[20:25]]


def test_what_is_no_saved_dataset(saved, tmp_path):
    folder, _ = saved
    state = {"_data_files": [{"filename": "data.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "data.arrow").write_bytes(b"nothing of the kind")
    old, outside, empty = tmp_path / "old", tmp_path / "outside", tmp_path / "empty"
    for path, content in (
        (old, {**state, "_indices_data_files": [{"filename": "i.arrow"}]}),
        (outside, {"_data_files": [{"filename": "../state.json"}]}),
        (empty, {"_data_files": []}),
    ):
        path.mkdir()
        (path / "state.json").write_text(json.dumps(content))
    for spec, message in [
        (hf(folder / "both"), r"holds several datasets \(train, test\); name one"),
        (hf(folder / "both", "tests"), "no split 'tests'; did you mean 'test'"),
        (hf(folder / "one", "train"), "holds one dataset, no DatasetDict"),
        (hf(folder / "one", x="questions"), "no column 'questions'; did you mean 'question'"),
        (hf(folder / "one", x="extra.answers"), "'extra' has no 'answers'; did you mean 'answer'"),
        (hf(folder / "nowhere"), "no state.json"),
        (hf(tmp_path), "not an Arrow stream"),
        (hf(old), "flatten_indices"),
        (hf(outside), "expected a name in this folder"),
        (hf(empty), "lists no data files"),
    ]:
        with pytest.raises(InputError, match=message):
            open_source(spec, seed=1)


def test_nested_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"extra": {"answer": "4", "parts": [{"x": 1}, {"x": 2}]}, "a.b": "dotted", "a": {"b": "nested"}}
    path.write_text(json.dumps(row) + "\n")

    def read(column):
        return open_source(DataSpec("jsonl", {"x": column}, path=str(path)), seed=1).row(0)["x"]

    assert read("extra.answer") == "4"
    assert read("extra.parts.1.x") == 2
    assert read("a.b") == "dotted", "a column of that very name comes first"
    for column, message in [
        ("extras.answer", "no column 'extras.answer'; did you mean 'extra'"),
        ("extra.answers", "'extra' has no 'answers'; did you mean 'answer'"),
        ("extra.parts.2.x", "'extra.parts' is a list of 2"),
        ("extra.answer.0", "'extra.answer' is str"),
    ]:
        with pytest.raises(InputError, match=message):
            read(column)


def test_unique_by_a_nested_column(tmp_path):
    Path(tmp_path / "a.jsonl").write_text("".join(f'{{"e": {{"q": "{i % 4}"}}}}\n' for i in range(12)))
    spec = DataSpec("jsonl", {"q": "e.q"}, path=str(tmp_path / "a.jsonl"), unique="e.q")
    assert len(open_source(spec, seed=1)) == 4
