"""Reading YAML: numbers of YAML 1.2, positions, limits; writing: what is read back is equal."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.errors import InputError, Problem
from realflow.graph.yamlfile import BROKEN, MAX_BYTES, dump_yaml, load_yaml, parse_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
    | st.sampled_from(
        ["1e-5", "yes", "on", "0o17", "017", "12:30:00", "1_000", "null", "~", ".inf", "-", "a: b"]
    )
)
KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=10) | st.integers(-9, 9)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_written_is_read_back_equal(value: object) -> None:
    again = parse_yaml(dump_yaml(value)).value
    assert again == value
    assert repr(again) == repr(value)  # types too: 1 is not 1.0


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_exact(value: float) -> None:
    assert parse_yaml(repr(value)).value == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("-0", 0),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        ("yes", "yes"),
        ("on", "on"),
        ("No", "No"),
        ("12:30", "12:30"),
        ("190:20:30", "190:20:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("0b1", "0b1"),
        ("TRUE", True),
        ("~", None),
        ("", None),
        ("<<", "<<"),
        ("=", "="),
        ("'1'", "1"),
        ('"true"', "true"),
        ("-.inf", float("-inf")),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(text).value
    assert (found, type(found)) == (value, type(value))


def test_every_key_path_has_its_line() -> None:
    document = parse_yaml("a: 1\nb:\n  c: [x,\n    y]\n  d:\n    - e\n    - f: 1\n", "f.yaml")
    wanted = {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", 1): 4, ("b", "d", 1): 7, ("b", "d", 1, "f"): 7}
    assert {path: document.line(path) for path in wanted} == wanted
    assert document.line(("b", "c", "unknown")) == 3
    inner = document.under("b", "d")
    assert inner.value == ["e", {"f": 1}]
    assert inner.problem((1, "f"), "wrong") == Problem("wrong", "b.d.1.f", "f.yaml", 7)


@pytest.mark.parametrize(
    ("text", "part", "line"),
    [
        (b"[" * 10_000_000, "larger than 1024 KiB", None),
        (b"[" * (MAX_BYTES - 1), "nested more than 64 levels", 1),
        (b"[\n" * 500_000, "nested more than 64 levels", 65),
        (b"{a: " * 200_000, "nested more than 64 levels", 1),
        (b"- " * 400_000, "nested more than 64 levels", 1),
        (b"? " * 400_000, "nested more than 64 levels", 1),
        (b"a: &x [1, 2]\nb: *x\n", "anchors are not read", 1),
        (b"a: 1\nb: *x\n", "aliases are not read", 2),
        (b"a: !!python/object/apply:os.system [x]\n", "tag", 1),
        (b"a: !x 1\n", "tag", 1),
        (b"a: 1\n---\nb: 2\n", "second document", 2),
        (b"a: 1\nb: \xff\n", "not UTF-8", 2),
        ("a: ä".encode("utf-16"), "not UTF-8", 1),
        (b"a: 1\nb: \x00\n", "not allowed", 2),
        (b"a: 1\na: 2\n", "twice, first on line 1", 2),
        (b"a:\n  b: 1\n  'b': 2\n", "twice, first on line 2", 3),
        (b"[1]: 2\n", "a key must be", 1),
        (b"true: 2\n", "a key must be", 1),
        (b"a: 1e999\n", "too large", 1),
        (b"a: " + b"9" * 5000, "too long", 1),
        (b"a: [1, 2\nb: 3\n", "not valid YAML", 2),
        (b"a:\n\t- b\n", "not valid YAML", 2),
        (b"a: b: c\n", "not valid YAML", 1),
    ],
)
def test_bad_files_are_one_clear_error_at_once(text: bytes, part: str, line: int | None) -> None:
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "f.yaml")
    assert time.process_time() - start < 0.5
    (problem,) = caught.value.problems
    assert part in problem.message
    assert (problem.file, problem.line) == ("f.yaml", line)
    assert len(str(problem)) < 300


def test_lesser_problems_are_collected_when_asked_for() -> None:
    problems: list[Problem] = []
    document = parse_yaml("a: 1\na: 2\nb: 1e999\nc: 3\n", "f.yaml", problems)
    assert [problem.line for problem in problems] == [2, 3]
    assert document.value == {"a": 1, "b": BROKEN, "c": 3}


def test_files(tmp_path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_yaml(tmp_path / "bom.yaml").value == {"a": 1}
    (tmp_path / "empty.yaml").write_bytes(b"# nothing\n")
    assert load_yaml(tmp_path / "empty.yaml").value is None
    with pytest.raises(InputError, match="no such file"):
        load_yaml(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="a folder"):
        load_yaml(tmp_path)
