"""Params: overrides and references, which keep types, and mistakes in them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realflow.errors import InputError, Problem
from realflow.graph.params import apply_params, escape
from realflow.graph.yamlfile import BROKEN, Document, dump_yaml, parse_yaml

PARAMS = "params: {lr: 1e-5, n: 8, name: x, on: true, none: null, list: [1, 2]}\n"


def replaced(text: str, *overrides: str) -> object:
    problems: list[Problem] = []
    document, _ = apply_params(parse_yaml(PARAMS + f"value: {text}\n"), overrides, problems)
    assert problems == []
    return document.value["value"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${lr}", 1e-5),
        ("${n} prompts", "8 prompts"),
        ("${ n }", 8),
        ("'${name}${n}'", "x8"),
        ("${list}", [1, 2]),
        ("${on}", True),
        ("is ${on}", "is true"),
        ("'${none}'", None),
        ("$${n}", "${n}"),
        ("a $${n} ${n}", "a ${n} 8"),
        ("$n", "$n"),
        ("$$$${n}", "$$${n}"),
        ("['${n}', {a: '${lr}'}]", [8, {"a": 1e-5}]),
    ],
)
def test_references(text: str, value: object) -> None:
    assert replaced(text) == value
    assert type(replaced(text)) is type(value)


@pytest.mark.parametrize(
    ("override", "text", "value"),
    [
        ("lr=2e-4", "${lr}", 2e-4),
        ("n=16", "${n}", 16),
        ("name=123", "${name}", "123"),
        ("name=a=b", "${name}", "a=b"),
        ("name=", "${name}", ""),
        ("list=[3, 4]", "${list}", [3, 4]),
        ("on=false", "${on}", False),
        ("none=text", "${none}", "text"),
        ("name=${n}", "${name}", "${n}"),
        ("name='a b'", "${name}", "a b"),
        ("n=yes", "${n}", "yes"),
    ],
)
def test_overrides_are_read_as_yaml_and_text_stays_text(override: str, text: str, value: object) -> None:
    assert replaced(f"'{text}'", override) == value


@given(st.text(), st.dictionaries(st.text(), st.lists(st.text(), max_size=2), max_size=3))
def test_escaped_values_stand_for_themselves(text: str, values: dict) -> None:
    problems: list[Problem] = []
    document = Document({"a": escape(text), "b": escape(values)})
    found, origins = apply_params(document, (), problems)
    assert (found.value, origins, problems) == ({"a": text, "b": values}, {}, [])


@pytest.mark.parametrize(
    ("text", "overrides", "part", "line"),
    [
        ("value: ${nam}", (), "${nam}: no such key under params; did you mean 'name'?", 2),
        ("value: a ${zzz} b", (), "known: lr, n, name", 2),
        ("value: ${n", (), "'${' without '}'", 2),
        ("value: x ${list}", (), "cannot stand inside a text", 2),
        ("value: ${n}", ("nam=1",), "did you mean 'name'?", None),
        ("value: ${n}", ("n",), "expected key=value", None),
        ("value: ${n}", ("n=1", "n=2"), "given twice", None),
        ("value: ${n}", ("n=[1",), "not valid YAML", None),
        ("value: ${n}", ("n=!!python/name:os.system x",), "tag", None),
        ("value: ${n}", ("lr=1",), "override 'lr' changes nothing", None),
    ],
)
def test_mistakes(text: str, overrides: tuple[str, ...], part: str, line: int | None) -> None:
    problems: list[Problem] = []
    document, _ = apply_params(parse_yaml(PARAMS + text, "f.yaml"), overrides, problems)
    assert part in problems[0].message
    assert problems[0].line == line
    assert len(problems) == 1
    if line == 2:
        assert document.value["value"] is BROKEN


def test_params_refer_to_nothing() -> None:
    problems: list[Problem] = []
    apply_params(parse_yaml("params:\n  a: 1\n  b: ${a}\n"), (), problems)
    assert "cannot refer to another" in problems[0].message
    assert problems[0].line == 3


def test_a_mapping_that_holds_itself_is_refused() -> None:
    loop: dict = {}
    loop["a"] = loop
    with pytest.raises(InputError, match="nested more than"):
        apply_params(Document(loop), (), [])


def test_origins_name_the_params() -> None:
    document = parse_yaml(dump_yaml({"params": {"a": 1, "b": 2}, "x": ["${a}", "${a} ${b}"]}))
    assert apply_params(document, (), [])[1] == {("x", 0): ("a",), ("x", 1): ("a", "b")}
