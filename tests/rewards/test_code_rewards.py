"""Programs by their tests: the forms of tests, what comes of right and wrong programs, HumanEval."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realflow.engines.functions import FunctionError, load_callable, run_function
from realflow.errors import InputError
from realflow.graph.builtins import BUILTINS
from realflow.graph.types import Call
from realflow.rewards.code import code, program_in
from realflow.rewards.humaneval import helpers, humaneval, whole_program
from realflow.rewards.sandbox import BrokenTests, Limits, run_tests
from realflow.rewards.sandbox.forms import Asserts, Calls, Dialogues, read_tests
from realflow.rewards.sandbox.inside.compare import same_text, same_value

ADD = "def add(a, b):\n    return a + b\n"
PAIRS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}


def fenced(program: str) -> str:
    return f"I think so.\n```python\n{program}```\nDone."


def test_rewards_of_a_batch():
    completions = [
        fenced(ADD),
        fenced("def add(a, b):\n    return a - b\n"),
        "no program at all",
        fenced("print(sum(map(int, input().split())))\n"),
        fenced("def add(a, b):\n    while True: pass\n"),
        fenced("def add(:\n"),
    ]
    asserts = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    tests = [asserts, asserts, asserts, json.dumps(PAIRS), asserts, asserts]
    found = code(completions, tests, seconds=2.0)
    assert found["rewards"] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert found["metrics"] == {
        "reward/code/no_program": pytest.approx(1 / 6),
        "reward/code/timeout": pytest.approx(1 / 6),
        "reward/code/limit": 0.0,
    }
    assert code(completions[1:2], tests[1:2], partial=True)["rewards"] == [0.5]


def test_a_graph_names_it_and_bad_tests_name_the_sample():
    decl = BUILTINS["rewards.code"]
    call = Call(
        "reward", "function", decl, reads={"completion": "completion", "tests": "tests"},
        writes={"rewards": "rewards"},
    )  # fmt: skip
    values = {"completion": [fenced(ADD)] * 2, "tests": [["assert add(1, 2) == 3"], 17]}
    extents, dtypes = dict.fromkeys(values, "sample"), {"completion": "text", "tests": "any"}

    def run(count):
        kept = {name: column[:count] for name, column in values.items()}
        return run_function(
            load_callable("rewards.code"), call, [40, 41][:count], kept, [3, 3][:count], extents, dtypes
        )

    assert run(1) == {"rewards": [1.0]}
    with pytest.raises(
        FunctionError, match=r"sample 41: raised BrokenTests: the tests are 17 \(int\)"
    ) as told:
        run(2)
    assert told.value.sample == 41


@pytest.mark.parametrize(
    ("program", "tests", "passed"),
    [
        (ADD, "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'", 1),
        (ADD, ["assert add([1], [2]) == [1, 2]", "assert add(1, 1) == 3"], 1),
        (ADD, {"fn_name": "add", "inputs": [[1, 2], [0.1, 0.2]], "outputs": [3, 0.3]}, 2),
        ("class Solution:\n    def add(self, a, b): return [a + b]\n",
         [{"input": "1\n2", "output": "[3]", "fn_name": "add"}], 1),
        ("a, b = map(int, input().split())\nprint(a + b)", PAIRS, 2),
        ("a, b = map(int, input().split())\nprint(a + b)\nraise SystemExit(1)", PAIRS, 0),
        ("print('3')", PAIRS, 1),
        ("print('3  \\n\\n')", [{"input": "", "output": "3"}], 1),
        ("import math\nprint(math.pi)", {"inputs": [""], "outputs": ["3.14159265"]}, 1),
        ("print(3.2)", {"inputs": [""], "outputs": ["3.14159265"]}, 0),
        ("def swap(l):\n    l[0], l[1] = l[1], l[0]\n", ["x = [1, 2]\nswap(x)\nassert x == [2, 1]"], 1),
        ("def each(f, l):\n    return [f(x) for x in l]\n",
         ["assert each(lambda x: 2 * x, [1, 2]) == [2, 4]"], 1),
        ("def f():\n    raise KeyError('k')\n",
         ["try:\n    f()\n    assert False\nexcept KeyError:\n    pass"], 1),
        ("def g(n):\n    yield from range(n)\n", ["assert list(g(3)) == [0, 1, 2]", "assert 2 in g(3)"], 2),
        ("class P:\n    def __init__(s, x): s.x = x\n    def __eq__(s, o): return s.x == o.x\n"
         "    def __add__(s, o): return P(s.x + o.x)\n",
         ["assert P(1) + P(2) == P(3)", "assert P(1).x == 1", "assert isinstance(P(1), P)",
          "assert P(1) == P(2)"], 3),
        ("from math import sqrt, isclose\ndef r(x): return sqrt(x)\n", ["assert isclose(r(4), 2)"], 1),
        (ADD, ["def test_a():\n    assert add(1, 1) == 2\ndef test_b():\n    assert add(9, 9) == 19"], 0),
        (ADD, ["import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n"
               "        self.assertEqual(add(1, 1), 2)"], 1),
        (ADD, ["import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n"
               "        self.assertEqual(add(1, 1), 3)"], 0),
        ("def deep():\n    l = []\n    l.append(l)\n    return l\n", ["assert deep()"], 0),
        ("import numpy as np\ndef f(x): return np.array(x) * 2\n", ["assert f([1, 2]) == [2, 4]"], 1),
        ("", ["assert nothing() == 1"], 0),
    ],
)  # fmt: skip
def test_programs_and_tests(program, tests, passed):
    assert run_tests(program, tests, Limits(seconds=5.0)).passed == passed


def test_verdicts_say_why():
    assert "printed '4" in run_tests("print(4)", {"inputs": [""], "outputs": ["3"]}).note
    assert "AssertionError" in run_tests(ADD, ["assert add(1, 1) == 3"]).note
    assert "SyntaxError" in run_tests("def f(:", ["assert f"]).note
    late = run_tests("while True: pass", ["assert f"], Limits(seconds=0.5))
    assert late.reason == "seconds" and "limit of seconds" in late.note
    assert run_tests("1/0", PAIRS, partial=False).total == 2


@pytest.mark.parametrize("tests", [None, 3, [], "", {}, {"inputs": ["a"], "outputs": []}, ["assert (", 3],
                                   {"inputs": [1], "outputs": [2]}, ["assert ("],
                                   {"fn_name": "a b", "inputs": [[1]], "outputs": [2]},
                                   {"fn_name": "f", "inputs": [1], "outputs": [2]}])  # fmt: skip
def test_tests_that_cannot_be_read_are_an_error(tests):
    with pytest.raises(BrokenTests, match="tests"):
        run_tests(ADD, tests)


def test_forms():
    assert read_tests("assert f(1)") == Asserts(("assert f(1)",))
    assert read_tests("[1, 2] == f()") == Asserts(("[1, 2] == f()",))
    assert read_tests(json.dumps(["assert f(1)"])) == Asserts(("assert f(1)",))
    assert read_tests({"inputs": [["a", "b"]], "outputs": ["c"]}) == Dialogues((("a\nb", "c"),))
    assert read_tests({"fn_name": "f", "inputs": [[1]], "outputs": [2]}) == Calls("f", (([1], 2),))


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```py\na\n```\n```python3\nb\n```", "b\n"),
        ("```python\na\n```\n```\nb\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```cpp\na\n```", None),
        ("```python\na\nb", "a\nb\n"),
        ("````python\n```\na\n````", "```\na\n"),
        ("~~~ Python\na\n~~~", "a\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("a", None),
        ("```python\n```", None),
    ],
)
def test_the_program_in_a_completion(text, program):
    assert program_in(text) == program


@given(st.text("`~ p\nython"))
def test_any_text_has_a_program_or_none(text):
    found = program_in(text)
    assert found is None or found.endswith("\n")


SCALARS = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
NESTED = st.recursive(SCALARS, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=10)


@given(NESTED)
def test_a_value_is_the_same_as_itself(value):
    assert same_value(value, json.loads(json.dumps(value)), 1e-6)


@given(st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6))
def test_values_that_differ(number, real):
    assert not same_value(number, number + 1, 1e-9)
    assert not same_value(real, real + 1 + abs(real) / 100, 1e-6)
    assert not same_value([number], [number, number], 1e-6)
    assert not same_value(number, str(number), 1e-6) and not same_value(True, 1, 1e-6)
    assert same_text(f"{number}\n", f"{number}", 1e-6) and not same_text(f"{number}", f"{number + 1}", 0.5)
    assert not same_text(f"{number}", f"{number}\n{number}", 1e-6)


PROMPT = '''from typing import List

def scale(x: float) -> float:
    """Twice."""
    return 2 * x

def doubled(numbers: List[float]) -> List[float]:
    """ Double each.
    >>> doubled([1.0])
    [2.0]
    """
'''
TEST = (
    "METADATA = {}\n\ndef check(candidate):\n    assert candidate([1.0, 2.0]) == [scale(1.0), scale(2.0)]\n"
)


def test_humaneval():
    completions = [
        "    return [scale(x) for x in numbers]\n",
        "    return [scale(x) for x in numbers]\n\nprint(doubled([1/0]))\n",
        "    return numbers\n",
        "Here:\n```python\ndef doubled(numbers):\n    return [2 * x for x in numbers]\n```",
        "    global scale\n    scale = lambda x: x\n    return numbers\n",
        "    return numbers\n\ndef scale(x):\n    return x\n",
        "```python\ndef scale(x):\n    return x\n\ndef doubled(numbers):\n    return numbers\n```",
        "",
    ]
    n = len(completions)
    found = humaneval(completions, [PROMPT] * n, [TEST] * n, ["doubled"] * n, seconds=5.0)
    assert found["rewards"] == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert helpers(PROMPT) == PROMPT and helpers("def f(") == ""
    assert whole_program("    return 1\nprint(2)", "def f():\n") == "def f():\n    return 1"
    with pytest.raises(ValueError, match="expected HumanEval's columns"):
        humaneval([""], [[{"role": "user"}]], [TEST], ["doubled"])


LISTS = '''class Node:
    def __init__(self, val, next=None):
        self.val = val
        self.next = next

def made(values):
    node = None
    for value in reversed(values):
        node = Node(value, node)
    return node

def reverse(head):
    """ Reverse a list, in place. """
'''
REVERSE = """    last = None
    while head:
        head.next, last, head = last, head, head.next
    return last
"""
COPY = """    copy = None
    while head:
        copy, head = Node(head.val, copy), head.next
    return copy
"""
CHECK = """
def values(node):
    found = []
    while node:
        found.append(node.val)
        node = node.next
    return found

def check(candidate):
    assert values(candidate(made([1, 2, 3]))) == [3, 2, 1]
    assert candidate(None) is None
"""


def test_objects_of_tests_and_of_programs():
    """A program changes a test's object in place, or makes its own of the same class."""
    bodies = [REVERSE, COPY, "    return head\n", "    head.__class__.__eq__ = None\n    return head\n"]
    found = humaneval(bodies, [LISTS] * 4, [CHECK] * 4, ["reverse"] * 4, seconds=5.0)
    assert found["rewards"] == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def total(x): return sum(x)\n", ["assert total(iter([1, 2])) == 3", "assert total(range(4)) == 6"]),
        ("def span(n): return range(n)\n", ["assert span(3) == range(3)", "assert list(span(2)) == [0, 1]"]),
        ("def safe(f):\n    try: return f(0)\n    except Exception: return None\n",
         ["assert safe(lambda x: 1 / x) is None", "assert safe(lambda x: x + 1) == 1"]),
        ("def same(a, b): return a is b\n",
         ["class A: pass\na = A()\nassert same(a, a) and not same(a, A())"]),
        ("def name(a): return a.tell()\n",
         ["class A:\n    def tell(self): return 'A'\nassert name(A()) == 'A'"]),
    ],
)  # fmt: skip
def test_what_goes_over(program, tests):
    assert run_tests(program, tests, Limits(seconds=5.0)).all_passed


@pytest.mark.parametrize(
    "way_in", ["f.__globals__", "f.func_globals", "o.__dict__", "o._hidden", "m.sys", "g.gi_frame"]
)
def test_a_program_cannot_look_behind_what_it_is_given(way_in):
    """The expected value lies in the globals of the tests' functions, and in a private attribute."""
    program = (
        f"def look(f, o, m, g):\n    try: {way_in}\n"
        "    except Exception: return 'refused'\n    return 'seen'\n"
    )
    tests = """
import os
class A:
    def __init__(self): self._hidden = 41
def given(x): return x
def frames(): yield 1
expected = 41
class Holder:
    def __init__(self, inner): self.inner = inner
assert look(given, A(), os, Holder(frames()).inner) == 'refused'
"""
    assert run_tests(program, [tests], Limits(seconds=5.0)).all_passed


def test_options():
    with pytest.raises(InputError, match="seconds must be a number above 0"):
        code(["x"], ["assert 1"], seconds=0.0)
    with pytest.raises(ValueError):
        code(["x", "y"], ["assert 1"])


@settings(max_examples=3, deadline=None)
@given(
    st.lists(st.integers(-(2**70), 2**70) | st.text() | st.binary() | st.tuples(st.integers()), max_size=4)
)
def test_values_come_back_as_they_went(values):
    """Through two walls and back: the types, too."""
    tests = f"x = {values!r}\ny = same(x)\nassert x == y and list(map(type, x)) == list(map(type, y))"
    verdict = run_tests("def same(x): return x", [tests])
    assert verdict.all_passed, verdict
